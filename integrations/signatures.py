"""CARAFE with the constructors of other implementations, for code and configuration files that call these.

`CARAFEPack` is mmcv's. The other two are those of the ports in forks of YOLO and U-Net, which compute logits by layers of their own.
`carafepp.convert_state_dict` converts the weights of all three.
"""

from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from ..models.carafe import CARAFE


class CARAFEPack(CARAFE):
    """CARAFE with the arguments of mmcv's CARAFEPack, mmdetection's and the official repository's; state dicts have the same names.

    Args:
        channels: C, the channels of input and output.
        scale_factor: the output has `scale_factor` times the rows and columns of the input.
        up_kernel: side of the reassembly window; odd.
        up_group: number of channel groups, each with its own kernels; must divide C.
        encoder_kernel: side of the content encoder's kernel; odd.
        encoder_dilation: dilation of the content encoder.
        compressed_channels: channels between compressor and encoder.

    Raises:
        TypeError, ValueError: see `carafepp.models.carafe.CARAFE`, where `scale_factor` is `up`, `up_kernel` is `kernel_size`, and
            `up_group` is `groups`.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ):
        super().__init__(
            channels,
            up=scale_factor,
            kernel_size=up_kernel,
            groups=up_group,
            encoder_kernel=encoder_kernel,
            encoder_dilation=encoder_dilation,
            compressed_channels=compressed_channels,
        )


class YoloCARAFE(CARAFE):
    """CARAFE of the YOLO ports: batch normalisation follows both convolutions, and an activation the compressor.

    A fork whose constructor has a single argument for channels calls `YoloCARAFE(c)`, and names further arguments.

    Args:
        c1: channels of the input.
        c2: channels of the output. If they differ from `c1`, a 1x1 convolution follows. None means `c1`.
        k_enc: side of the content encoder's kernel; odd.
        k_up: side of the reassembly window; odd.
        c_mid: channels between compressor and encoder.
        scale: the output has `scale` times the rows and columns of the input.
        activation: the activation after the compressor: SiLU in YOLOv5 and later, ReLU in the port that these descend from.
        eps, momentum: of the batch norms; the defaults are those that YOLOv5 and ultralytics set in every network.

    Raises:
        TypeError, ValueError: see `carafepp.models.carafe.CARAFE`, where `scale` is `up`, `k_up` is `kernel_size`, `k_enc` is
            `encoder_kernel`, and `c_mid` is `compressed_channels`.
    """

    def __init__(
        self,
        c1: int,
        c2: int | None = None,
        k_enc: int = 3,
        k_up: int = 5,
        c_mid: int = 64,
        scale: int = 2,
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        eps: float = 1e-3,
        momentum: float = 0.03,
    ):
        super().__init__(c1, up=scale, kernel_size=k_up, encoder_kernel=k_enc, compressed_channels=c_mid)
        self.compressor_norm = nn.Sequential(nn.BatchNorm2d(c_mid, eps, momentum), activation())
        self.encoder_norm = nn.BatchNorm2d(self.content_encoder.out_channels, eps, momentum)
        self.out = nn.Identity() if c2 in (None, c1) else nn.Conv2d(c1, c2, 1)

    def logits(self, x: Tensor) -> Tensor:
        """Encode the content of x [N, c1, H, W] into normalised logits [N, k_up**2 * scale**2, H, W]."""
        return self.encoder_norm(super().logits(x))

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, c1, H, W] to [N, c2, H * scale, W * scale], or to [N, c2, *size] (see `CARAFE.forward`)."""
        return self.out(super().forward(x, size))


class ProjectedCARAFE(CARAFE):
    """CARAFE of the ports whose layers are `down`, `encoder` and `out`: a 1x1 convolution follows the reassembly.

    Args:
        c1: channels of the input.
        c2: channels of the output.
        kernel_size: side of the reassembly window, and of the content encoder's kernel; odd.
        up_factor: the output has `up_factor` times the rows and columns of the input.
        encoder_kernel: side of the content encoder's kernel, where it differs from `kernel_size`.
        compressed_channels: channels between compressor and encoder; None is a quarter of `c1`, rounded down.

    Raises:
        TypeError, ValueError: see `carafepp.models.carafe.CARAFE`, where `c1` is `channels` and `up_factor` is `up`.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        kernel_size: int = 3,
        up_factor: int = 2,
        *,
        encoder_kernel: int | None = None,
        compressed_channels: int | None = None,
    ):
        super().__init__(
            c1,
            up=up_factor,
            kernel_size=kernel_size,
            encoder_kernel=kernel_size if encoder_kernel is None else encoder_kernel,
            compressed_channels=c1 // 4 if compressed_channels is None else compressed_channels,
        )
        self.out = nn.Conv2d(c1, c2, 1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample x [N, c1, H, W] to [N, c2, H * up_factor, W * up_factor], or to [N, c2, *size] (see `CARAFE.forward`)."""
        return self.out(super().forward(x, size))
