"""The training loop: one step of the algorithm, and the state that it carries."""
