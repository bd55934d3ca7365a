"""One training step of the operator as data: its tensors, and the launches of forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Spec
from .launch import Launch
from .operator_launches import backward_launches, forward_launches, problem_of
from .tiles.geometry import KernelName, Tile, TileProblem


class TrainingStep(NamedTuple):
    """The tensors of one training step. The output also serves as its own gradient, because no code depends on the values."""

    x: Tensor  # [N, C, H, W]
    logits: Tensor  # [N, G * K * K, up, up, Hq, Wq]
    y: Tensor  # [N, C, Ho, Wo]
    lse: Tensor  # [N, G, up, up, Hq, Wq]
    spec: Spec

    def problem(self, capability: tuple[int, int] | None = None) -> TileProblem:
        """Return the properties that the choice of a tile depends on, for the device of the tensors or for one of this capability."""
        return problem_of(self.x, self.logits, self.y, self.spec, capability)

    def build_launches(self, kernel: KernelName, *, tile: Tile | None = None, capability: tuple[int, int] | None = None) -> list[Launch]:
        """Return the launches of one pass, or of one gradient.

        Args:
            kernel: "forward" and "backward" are passes.
            tile: replaces the measured or ranked tile; the gradients of "backward" have one launch then.
            capability: replaces the capability of the device of the tensors.
        """
        if kernel == "forward":
            return forward_launches(self.x, self.logits, self.y, self.lse, self.spec, tile=tile, capability=capability)
        dx = None if kernel == "logit_gradient" else torch.empty_like(self.x)
        dlogits = None if kernel == "source_gradient" else torch.empty_like(self.logits)
        tensors = (self.y, self.x, self.logits, self.lse, dx, dlogits)
        return backward_launches(*tensors, self.spec, tile=tile, capability=capability)


def build_training_step(
    n: int,
    channels: int,
    height: int,
    width: int,
    spec: Spec,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device | str = "meta",
) -> TrainingStep:
    """Return a step for features [n, channels, height, width], random on a real device and without memory on "meta"."""

    def random(*size: int) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)
        return empty if empty.is_meta else empty.normal_()

    taps = spec.groups * spec.taps
    logits = random(n, taps * spec.up**2, spec.cells(height), spec.cells(width)).unflatten(1, (taps, spec.up, spec.up))
    lse = torch.zeros((n, spec.groups, *logits.shape[2:]), device=device)
    y = random(n, channels, spec.output_size(height), spec.output_size(width))
    return TrainingStep(random(n, channels, height, width), logits, y, lse, spec)
