"""Advantage within a group of rollouts."""
