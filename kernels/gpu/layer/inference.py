"""The module without gradients, in half precision and channels_last: three launches, and two allocations, for its layers and the operator.

Features and the copied weight lie in the memory of the output, as far as they fit: the operator, which reads neither, fills it last.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...execution import Layouts, view_cells
from ..launch import POINTERS, Launch, Plan, Plans, distinguish, on_device_of
from ..operator_launches import INTERPRETED, forward_launches
from .encoder import Layers, Parameters, compress_launch, encode_launch

# memory is divided at multiples of this many elements of 2 bytes, to which all code may be aligned
STEP = 128


def runs_on(x: Tensor, parameters: Parameters) -> bool:
    """Return whether the launches are for the device and the dtypes of these tensors."""
    if not INTERPRETED and (torch.version.hip or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    return x.dtype.itemsize == 2 and all(tensor is None or tensor.dtype in POINTERS for tensor in parameters)


class Inference:
    """The launches of the module for maps and parameters of one layout, planned once. Tensors must begin at multiples of 16 bytes.

    Args:
        x: [N, C, H, W] in channels_last, float16 or bfloat16.
        parameters, layers: the layers, see `encoder.compress_launch`.
        layouts: those of the reassembly.
    """

    def __init__(self, x: Tensor, parameters: Parameters, layers: Layers, layouts: Layouts):
        self.layers, self.layouts = layers, layouts
        self.features_shape = (x.shape[0], *x.shape[2:], layers.width)
        self.logits_shape = (x.shape[0], *layouts.cells_shape[-2:], layers.row)
        # of the features, unless they are x, the copied weight, the logits and the log-sum-exp: the memory, 0 for that of y and 1 for
        # scratch memory, and the first element
        self.places: list[tuple[int, int]] = []
        room, ends = math.prod(layouts.y_shape), [0, 0]
        sizes = (
            math.prod(self.features_shape) if layers.compressed else 0,
            layers.copied,
            math.prod(self.logits_shape),
            2 * math.prod(layouts.lse_shape),
        )
        for part, size in enumerate(sizes):
            memory = 0 if part < 2 and ends[0] + size <= room else 1
            self.places.append((memory, ends[memory]))
            ends[memory] += -(-size // STEP) * STEP
        self.scratch = ends[1]
        self.plans: list[Plan] = []
        if not INTERPRETED:
            y, scratch = self.allocate(x)
            tensors, parameters = self._view(x, y, scratch), Parameters(*distinguish(parameters))
            with on_device_of(x):
                self.plans = [Plan(launch, [x, y, *tensors, *parameters]) for launch in self._build(x, y, tensors, parameters)]

    def allocate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the output and the memory of everything between the launches."""
        return x.new_empty_strided(self.layouts.y_shape, self.layouts.y_strides), x.new_empty(self.scratch)

    def _view(self, x: Tensor, y: Tensor, scratch: Tensor) -> tuple[Tensor, ...]:
        """Return the features, the copied weight, the logits, the same as cells, and the log-sum-exp."""
        memories = y.as_strided((y.numel(),), (1,)), scratch
        features, copy, logits, lse = (memories[memory][first:] for memory, first in self.places)
        if self.layers.compressed:
            x = features[: math.prod(self.features_shape)].view(self.features_shape).permute(0, 3, 1, 2)
        logits = logits[: math.prod(self.logits_shape)].view(self.logits_shape).permute(0, 3, 1, 2)
        cells = view_cells(logits, self.layouts)
        lse = lse[: 2 * math.prod(self.layouts.lse_shape)].view(torch.float32).view(self.layouts.lse_shape)
        return x, copy[: self.layers.copied], logits, cells, lse

    def _build(self, x: Tensor, y: Tensor, tensors: tuple[Tensor, ...], parameters: Parameters) -> list[Launch]:
        features, copy, logits, cells, lse = tensors
        precision = "widened" if INTERPRETED else "ieee"
        return [
            compress_launch(x, features, copy, parameters, self.layers, precision=precision),
            encode_launch(features, copy, logits, parameters, self.layers, precision=precision),
            *forward_launches(x, cells, y, lse, self.layouts.spec),
        ]

    def launches(self, x: Tensor, y: Tensor, scratch: Tensor, parameters: Parameters) -> list[Launch]:
        """Return the launches that fill y, with tensors from `allocate`, on any device."""
        return self._build(x, y, self._view(x, y, scratch), parameters)

    def run(self, x: Tensor, parameters: Parameters, addresses: list[int]) -> Tensor:
        """Compute the output [N, C, Ho, Wo]; `addresses` are those of the parameters."""
        y, scratch = self.allocate(x)
        if INTERPRETED:
            for launch in self.launches(x, y, scratch, parameters):
                launch.interpret()
            return y
        source, memories = x.data_ptr(), (y.data_ptr(), scratch.data_ptr())
        features, copy, logits, lse = [memories[memory] + 2 * first for memory, first in self.places]
        tensors = source, memories[0], features if self.layers.compressed else source, copy, logits, logits, lse, *addresses
        with on_device_of(x):
            for plan in self.plans:
                plan.run(tensors)
        return y


# Inference, Training, or False where the layers must be called. A detector that meets 500 sizes of images at ten sites has 5,000 layouts,
# of some 10 KB each.
plans: Plans[Any] = Plans(8192)
