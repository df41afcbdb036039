"""What is timed, how, and the page that shows it."""
