"""The operator: definition, kernels, registration."""

from .reassembly import reassemble, reassemble_weights
from .reference import reassemble_reference

__all__ = ["reassemble", "reassemble_reference", "reassemble_weights"]
