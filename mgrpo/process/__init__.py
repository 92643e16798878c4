"""Threads, signals, output and file writes of this process."""
