"""Log-probability and entropy from hidden states and the head's weight."""
