"""Entropy of whole trajectories."""
