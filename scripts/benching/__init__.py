"""What `carafepp-bench` measures: the operator, the samplers, the networks."""
