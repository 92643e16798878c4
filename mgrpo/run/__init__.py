"""A run on a disk: steps, checkpoints, resume, and the checks before the first step."""
