"""Clipped policy-gradient losses."""
