"""Our kernels for the log-probs and entropies of other trainers, one file for each."""
