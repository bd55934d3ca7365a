"""The encoder side of A2U: downsampling with kernels from second-order features of the map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble_weights
from .guided_samplers import A2U


class A2UPool(A2U):
    """Affinity-aware downsampling (Dai et al., CVPR 2021): 6x6 kernels from second-order features of the map itself.

    The affinities are those of `A2U`, which the authors' encoder computes together with these, but from x. For each output pixel, the
    softmax of the 36 spread affinities weighs the rows 2i - 2 to 2i + 3 and the columns 2j - 2 to 2j + 3 of x; pixels outside the map are
    0. All channels share a kernel. 42 C + 38 parameters, 10,790 for C = 256; 108 C multiply-adds per output pixel. The licence of the
    authors' code is MIT.

    Args:
        channels: C.
    """

    needs_guide = False

    def __init__(self, channels: int):
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        weights = self.spread_affinity(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(1)
        side = 2 * self.kernel_size
        # a window of odd side around 2i, whose first row and column have weight 0
        weights = F.pad(weights.unflatten(1, (side, side)), (0, 0, 0, 0, 1, 0, 1, 0)).flatten(1, 2)
        return reassemble_weights(x, weights.to(x.dtype), kernel_size=side + 1, down=2)
