"""Teacher and student around the loss: which features, from whom, when, how much."""
