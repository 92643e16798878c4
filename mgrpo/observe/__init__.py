"""Metrics of a step, the collapse monitor, and where numbers are written and shown."""
