"""Interquartile filter on trajectory entropy."""
