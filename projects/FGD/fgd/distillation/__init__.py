"""Teacher and student around a method: which features, from whom, when, how much."""
