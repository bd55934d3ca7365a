"""Downsampling without aliasing: a maximum followed by a low-pass filter, and a low-pass filter by the Fourier transform."""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels.geometry import memory_format
from .pooling import BlurPool


class MaxBlurPool(BlurPool):
    """Antialiased max-pooling (Zhang, ICML 2019): the maximum over 2x2 at stride 1, then `BlurPool`. No parameters.

    The authors replace a max-pool in this way, as in the stem of their ResNet. They replace a strided convolution by a convolution and
    `BlurPool`. The maximum is over whole windows, one row and column fewer than x has. An odd side is first lengthened by a pixel that
    takes no part in a maximum. 3 comparisons per input element and 16 multiply-adds per output element. This class was not taken from the
    authors' code, whose licence is CC BY-NC-SA 4.0.

    Args:
        channels: not used, because the filter is the same for all channels.
        kernel_size: side of the filter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=float("-inf"))
        return super().forward(F.max_pool2d(even, 2, stride=1))


@torch.fx.wrap
def _keep_low_frequencies(x: Tensor) -> Tensor:
    """Keep the lower half of the frequencies of x [N, C, H, W] in each direction; return [N, C, ceil(H / 2), ceil(W / 2)]."""
    height, width = x.shape[2:]
    rows, columns = (height + 1) // 2, (width + 1) // 2
    if x.shape[0] == 0:
        # some libraries refuse to transform an empty batch
        return x[..., :rows, :columns]
    # the transform of a half-precision map needs sides that are powers of two
    spectrum = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)), norm="forward")
    spectrum = torch.fft.fftshift(spectrum, dim=(2, 3))
    spectrum = spectrum.narrow(2, height // 2 - rows // 2, rows).narrow(3, width // 2 - columns // 2, columns)
    y = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(2, 3)), norm="forward").abs()
    return y.to(x.dtype, memory_format=memory_format(x))


class FLCPool(nn.Module):
    """FrequencyLowCut pooling (Grabinski et al., ECCV 2022): the lower half of the frequencies of a map. No parameters.

    The map is transformed by Fourier, the frequencies -ceil(H / 2) / 2 to ceil(H / 2) / 2 - 1 of its rows are kept, rounded down, and
    likewise those of its columns, and the magnitude of their inverse transform is the output. It has no aliasing. Unlike windows of pixels,
    it reads the whole map for every output, and continues the map periodically. The mean of the map stays; in the authors' code, which is
    not normalised, values are 4 times as large. As in their code, a value below 0 becomes positive. Sides that are not
    divisible by 4 keep frequencies around 0 here. About 2.5 log2(H W) operations per element in each transform. The licence of the
    authors' code is MIT.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Downsample x [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
        return _keep_low_frequencies(x)
