"""Accuracy of a model on labelled prompts."""
