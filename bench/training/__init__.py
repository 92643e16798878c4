"""Times of the trainer and of its phases."""
