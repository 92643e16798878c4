"""Metrics of a step, the collapse monitor, trackers, console, plots and report."""
