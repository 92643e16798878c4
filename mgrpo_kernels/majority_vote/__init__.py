"""Majority vote over the answers of a group."""
