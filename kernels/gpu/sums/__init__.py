"""The operator as sums over taps, without matrix products."""
