"""This process: its threads, signals, output and files."""
