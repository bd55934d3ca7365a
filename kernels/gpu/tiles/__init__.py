"""The tiles of the banded kernels: which fit, what they cost, and which are the fastest."""
