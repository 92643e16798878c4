"""Training runs and comparisons whose results stand in the documentation."""
