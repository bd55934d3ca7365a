"""What `carafepp-bench` measures: the operator, its growth, the samplers, the networks."""

from .growth import bench_growth
from .models import bench_models
from .operator import bench_operator
from .samplers import bench_samplers

__all__ = ["bench_growth", "bench_models", "bench_operator", "bench_samplers"]
