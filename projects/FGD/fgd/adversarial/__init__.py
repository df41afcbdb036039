"""Images that mislead the teacher, made once from those of the training set."""
