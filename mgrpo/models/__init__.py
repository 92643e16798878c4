"""Models of transformers: loading, forward passes, the momentum model, saving."""
