"""Shared by all tests: quiet transformers."""

from mgrpo.policy import quiet_transformers

quiet_transformers()
