"""Long runs of random cases: `make soak`, or `python -m soak PART --minutes M --seed S` with tests and tests/support on the path."""
