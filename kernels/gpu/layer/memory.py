"""Tensors that lie in one piece of memory, so that one allocation serves all of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .inference import STEP


class Piece(NamedTuple):
    """A tensor that lies in a larger piece of memory, which is a vector of elements of 2 bytes."""

    memory: int  # its number
    first: int  # element
    shape: tuple[int, ...]
    wide: bool  # whether the tensor is float32

    @property
    def end(self) -> int:
        """The element after the tensor."""
        return self.first + math.prod(self.shape) * (1 + self.wide)

    def view(self, memories: Sequence[Tensor]) -> Tensor:
        """Return the tensor; a map [N, H, W, C] as [N, C, H, W]."""
        part = memories[self.memory][self.first : self.end]
        tensor = (part.view(torch.float32) if self.wide else part).view(self.shape)
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def place(pieces: Sequence[tuple[tuple[int, ...], bool, bool]], room: int) -> tuple[list[Piece], int]:
    """Place tensors, given as shape, whether they are float32, and whether they are temporary.

    Returns:
        The tensors, and the size of memory 1. Memory 0 has room for this many elements and takes temporary tensors.
    """
    placed, ends = [], [0, 0]
    for shape, wide, temporary in pieces:
        piece = Piece(0, ends[0], shape, wide)
        if not temporary or piece.end > room:
            piece = Piece(1, ends[1], shape, wide)
        placed.append(piece)
        ends[piece.memory] = -(-piece.end // STEP) * STEP
    return placed, ends[1]
