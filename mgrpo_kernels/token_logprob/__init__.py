"""Log-probability and entropy from logits."""
