"""Sampling modules and networks."""
