"""Benches: the operator and other implementations, the growth of its time, the samplers, and the networks of the paper's tables."""

from .growth import bench_growth
from .models import bench_models
from .operator import bench_operator
from .samplers import bench_samplers

__all__ = ["bench_growth", "bench_models", "bench_operator", "bench_samplers"]
