"""Labels by a detector for images that have none: who finds, how well, and what is written."""
