"""Code shared by the operations."""
