"""Dynamic lightweight upsampling: kernels at source size, sampled at the target size."""

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from ..kernels import reassemble_weights
from .point_samplers import read_points
from .samplers import fit_double, shuffle_pixels

torch.fx.wrap("fit_double")
torch.fx.wrap("shuffle_pixels")


@torch.fx.wrap
def _read_kernels(kernels: Tensor, offsets: Tensor) -> Tensor:
    """Read kernels [N, T, H, W] bilinearly at the source pixel of each target plus its offset; the border repeats.

    Args:
        kernels: [N, T, H, W].
        offsets: [N, 2, 2H, 2W], to the right and down, in source pixels.

    Returns:
        [N, T, 2H, 2W].
    """
    # half precision cannot resolve the positions
    dtype = torch.promote_types(kernels.dtype, torch.float32)
    columns = torch.arange(offsets.shape[3], device=offsets.device) // 2 + 0.5 + offsets[:, :1].to(dtype)
    rows = torch.arange(offsets.shape[2], device=offsets.device)[:, None] // 2 + 0.5 + offsets[:, 1:].to(dtype)
    return read_points(kernels, rows, columns)


class DLU(nn.Module):
    """DLU (Fu et al., "Lighten CARAFE", ICPR 2024): CARAFE with one kernel per source pixel, sampled at predicted offsets.

    The compressor and an encoder of CARAFE give a kernel of 5x5 softmax weights for each source pixel. A second 3x3 convolution of the
    compressed features predicts an offset in source pixels for each target. The kernel of the target is the bilinear reading of the map of
    kernels at its source pixel plus the offset. Offsets start at 0, so that all targets of a source pixel share its kernel.
    64 C + 19,105 parameters, 35,489 for C = 256, as published (CARAFE: 74,148); 16 C + 4,752 multiply-adds for encoding and 25 C for the
    sum per output pixel. Written from the paper; the repository of the authors states no licence for this code.

    Args:
        channels: C.
        kernel_size: side of the kernels, odd.
        encoder_kernel: side of the convolutions that predict kernels and offsets, odd.
        compressed_channels: channels of the compressed features.
    """

    def __init__(self, channels: int, kernel_size: int = 5, encoder_kernel: int = 3, compressed_channels: int = 64):
        super().__init__()
        self.kernel_size = kernel_size
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        padding = encoder_kernel // 2
        self.kernel_space_generator = nn.Conv2d(compressed_channels, kernel_size**2, encoder_kernel, padding=padding)
        self.conv_offset = nn.Conv2d(compressed_channels, 8, encoder_kernel, padding=padding)
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.kernel_space_generator.weight, std=0.001)
        nn.init.zeros_(self.conv_offset.weight)
        for layer in (self.channel_compressor, self.kernel_space_generator, self.conv_offset):
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, 2H, 2W], or to `size`, whose sides may differ from these by 1."""
        compressed = self.channel_compressor(x)
        kernels = self.kernel_space_generator(compressed).softmax(1)  # [N, K * K, H, W]
        weights = _read_kernels(kernels, shuffle_pixels(self.conv_offset(compressed)))
        return fit_double(reassemble_weights(x, weights.to(x.dtype), kernel_size=self.kernel_size, up=2), x, size)
