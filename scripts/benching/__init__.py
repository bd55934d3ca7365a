"""Benches: the operator and others, the growth of its time, samplers, attention, the module, and the networks of the paper's tables."""

from .attention import bench_attention
from .growth import bench_growth
from .models import bench_models
from .module import bench_module
from .operator import bench_operator
from .samplers import bench_samplers

__all__ = ["bench_attention", "bench_growth", "bench_models", "bench_module", "bench_operator", "bench_samplers"]
