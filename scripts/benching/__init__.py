"""Benches: the operator and other implementations, the growth of its time, samplers, the module, and the networks of the paper's tables."""

from .growth import bench_growth
from .models import bench_models
from .module import bench_module
from .operator import bench_operator
from .samplers import bench_samplers

__all__ = ["bench_growth", "bench_models", "bench_module", "bench_operator", "bench_samplers"]
