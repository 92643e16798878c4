"""The kernels under the log-probs and entropies of other trainers, a file a host."""
