"""Averages of a map over a fixed number of cells, which can be exported to ONNX for maps of any size."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def _average(cells: int, size: int, device: torch.device) -> Tensor:
    """Compute the matrix [cells, size] that averages `size` pixels over each of the cells."""
    first = torch.arange(cells, device=device)[:, None]
    pixels = torch.arange(size, device=device)
    inside = (pixels >= first * size // cells) & (pixels < ((first + 1) * size + cells - 1) // cells)
    inside = inside.float()
    return inside / inside.sum(1, keepdim=True)


def pool_cells(x: Tensor, cells: int) -> Tensor:
    """Average x [N, C, H, W] over cells x cells rectangles that cover it, to [N, C, cells, cells], as `F.adaptive_avg_pool2d` does."""
    height, width = x.shape[2:]
    if cells == 1 or not isinstance(height * width, torch.SymInt) or not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, cells)
    # PyTorch's exporter would fix the rectangles to those of its example
    rows, columns = _average(cells, height, x.device), _average(cells, width, x.device)
    return (rows @ x.float() @ columns.T).to(x.dtype)


class CellPool(nn.Module):
    """Module that averages a map over `cells` x `cells` rectangles (see `pool_cells`)."""

    def __init__(self, cells: int):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """Average x [N, C, H, W], to [N, C, cells, cells]."""
        return pool_cells(x, self.cells)

    def extra_repr(self) -> str:
        """Show the number of cells in the representation of the module."""
        return f"cells={self.cells}"
