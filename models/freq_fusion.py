"""FreqFusion (Chen et al., TPAMI 2024): low-pass kernels for the coarse map, a high-pass residual for the finer one, and resampling."""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble
from .guides import Guided, multiply_windows, prepare_guide, sum_windows
from .point_samplers import sample
from .samplers import fit, shuffle_pixels

torch.fx.wrap("fit")
torch.fx.wrap("multiply_windows")
torch.fx.wrap("prepare_guide")
torch.fx.wrap("sample")
torch.fx.wrap("shuffle_pixels")
torch.fx.wrap("sum_windows")


def _drop_positions(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Remove the regular positions, which published weights hold as a buffer, before a state dict is loaded."""
    state.pop(f"{prefix}init_pos", None)


class SimilarityResampler(nn.Module):
    """Offset generator of FreqFusion: reads each pixel of a map at a predicted offset, for example away from an edge.

    Both compressed maps are normalised in groups of 8 channels, and get 8 more channels: the cosine similarities of a pixel with those 2
    pixels away, 0 outside the map. 3x3 convolutions predict an offset per output pixel and group of channels from both, and a factor in
    (0, 1) per offset. 180 groups (channels + 8) + 20 groups + 4 channels parameters.

    Args:
        channels: channels of the compressed maps, a multiple of 8.
        groups: groups of channels of the resampled map, each with its own offsets.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.offset, self.direct_scale = (nn.Conv2d(channels + 8, 8 * groups, 3, padding=1) for _ in range(2))
        self.hr_offset, self.hr_direct_scale = (nn.Conv2d(channels + 8, 2 * groups, 3, padding=1) for _ in range(2))
        # the offsets start near 0, and their factors at 1 / 2; the authors' code sets this too, but then draws all weights by Xavier's rule
        for layer, std in ((self.offset, 0.001), (self.hr_offset, 0.001), (self.direct_scale, 0), (self.hr_direct_scale, 0)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.get_parameter("bias"))
        self.norm_hr, self.norm_lr = (nn.GroupNorm(channels // 8, channels) for _ in range(2))
        self.register_load_state_dict_pre_hook(_drop_positions)

    @staticmethod
    def append_similarities(x: Tensor) -> Tensor:
        """Append to x [N, M, H, W] the cosine similarities with the 8 pixels around, 2 rows and columns away: [N, M + 8, H, W]."""
        directions = F.normalize(x, dim=1, eps=1e-8)
        products = multiply_windows(directions, directions, kernel_size=5, up=1)
        products = products.unflatten(1, (5, 5))[:, ::2, ::2].flatten(1, 2)
        return torch.cat([x, products[:, :4], products[:, 5:]], dim=1)

    def forward(self, y: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """Resample y [N, C, h, w] by offsets from the compressed maps `fine` [N, M, h, w] and `coarse` [N, M, H, W]; h is about 2H."""
        size = y.shape[2:]
        fine = self.append_similarities(self.norm_hr(fine))
        coarse = self.append_similarities(self.norm_lr(coarse))
        offsets = fit(shuffle_pixels(self.offset(coarse)), size) + self.hr_offset(fine)
        factors = (fit(shuffle_pixels(self.direct_scale(coarse)), size) + self.hr_direct_scale(fine)).sigmoid()
        # offsets are in pixels of the coarse map
        return sample(y, 2 * (offsets * factors).unflatten(1, (2, self.groups)), up=1)


class FreqFusion(Guided):
    """FreqFusion: CARAFE kernels that smooth inside objects, predicted from both maps, and a finer map whose details are amplified.

    With N(z) = softmax(z) times a Hamming window, divided by its sum, C_s(x, w) the sum of windows of x with kernels w after upsampling by
    s, and the guide g and x compressed to g' and x' by 1x1 convolutions:

    - g'' = 2 g' - C_1(g', N(E_2 g')), with a 3x3 encoder E_2 of 3x3 kernels, sharpens the compressed guide;
    - L = E_1 g'' + C_2(E_1 x', N(E_1 g'')), with a 3x3 encoder E_1 of 5x5 kernels, are the logits of the low-pass kernels;
    - y = C_2(x, N(L)), resampled by `SimilarityResampler`, is the upsampled map;
    - 2 g - C_1(g, N(E_2 g' + C_2(E_2 x', N(L)))) is the rewritten guide.

    M (C + C_guide) + 308 M + 34 parameters, 52,514 for C = C_guide = 256, and 104,690 with the resampler of 4 groups. State-dict keys are
    those of the authors' code (github.com/Linwei-Chen/FreqFusion, without a licence), from whose formulas this is written. Windows read
    zeros outside the map, as in mmcv's operator, with which the authors train; their code without mmcv reflects the map instead. Odd sides
    of the guide are allowed.

    Args:
        channels: C, the channels of x.
        guide_channels: C_guide, the channels of the guide; None means C.
        compressed_channels: M, a multiple of 8. The authors' detectors have (C + C_guide) / 8.
        resample: whether y is resampled, as in the authors' detectors.
        groups: groups of channels, each with its own offsets; must divide C.
        rewrites_guide: whether the guide is rewritten too. Networks that combine it with y set it (see samplers.py).

    Raises:
        ValueError: `groups` does not divide `channels`, or `compressed_channels` is not a multiple of 8.
    """

    rewrites_guide = False
    lowpass_size = 5
    highpass_size = 3

    def __init__(
        self,
        channels: int,
        guide_channels: int | None = None,
        compressed_channels: int = 64,
        resample: bool = True,
        groups: int = 4,
        rewrites_guide: bool = False,
    ):
        super().__init__(channels, guide_channels)
        if channels % groups:
            raise ValueError(f"groups must divide channels, got groups={groups} for channels={channels}")
        if compressed_channels < 8 or compressed_channels % 8:
            raise ValueError(f"compressed_channels must be a multiple of 8, got {compressed_channels}")
        self.rewrites_guide = rewrites_guide
        self.hr_channel_compressor = nn.Conv2d(self.guide_channels, compressed_channels, 1)
        self.lr_channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(compressed_channels, self.lowpass_size**2, 3, padding=1)
        self.content_encoder2 = nn.Conv2d(compressed_channels, self.highpass_size**2, 3, padding=1)
        for layer in (self.hr_channel_compressor, self.lr_channel_compressor, self.content_encoder, self.content_encoder2):
            if layer.kernel_size == (1, 1):
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.get_parameter("bias"))
        for name, size in (("hamming_lowpass", self.lowpass_size), ("hamming_highpass", self.highpass_size)):
            window = torch.hamming_window(size, periodic=False, dtype=torch.float64)
            # float32 and [1, 1, K, K], as published weights hold it
            self.register_buffer(name, window.outer(window).float()[None, None])
        self.dysampler = SimilarityResampler(compressed_channels, groups) if resample else None

    def upsample(self, x: Tensor, logits: Tensor) -> Tensor:
        """Upsample x [N, C, H, W] to [N, C, h, w] with the low-pass kernels of `logits` [N, 25, h, w]."""
        # softmax(z) w / sum = softmax(z + log w)
        logits = logits + self.get_buffer("hamming_lowpass").log().view(1, -1, 1, 1)
        return sum_windows(x, logits, self.lowpass_size, normalizer="softmax")

    def sharpen(self, x: Tensor, logits: Tensor) -> Tensor:
        """Double what the high-pass kernels of `logits` [N, 9, H, W] leave of x [N, C, H, W], its difference to the smoothed x."""
        logits = logits + self.get_buffer("hamming_highpass").log().view(1, -1, 1, 1)
        return 2 * x - reassemble(x, logits.to(x.dtype), kernel_size=self.highpass_size)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w].

        Returns:
            The upsampled map, or with `rewrites_guide` the pair of the upsampled map and the rewritten guide.
        """
        guide = prepare_guide(x, guide, self.guide_channels)
        fine, coarse = self.hr_channel_compressor(guide), self.lr_channel_compressor(x)
        highpass = self.content_encoder2(fine)  # [N, 9, h, w]
        fine = self.sharpen(fine, highpass)
        lowpass = self.content_encoder(fine)  # [N, 25, h, w]
        lowpass = lowpass + self.upsample(self.content_encoder(coarse), lowpass)
        y = self.upsample(x, lowpass)
        if self.dysampler is not None:
            y = self.dysampler(y, fine, coarse)
        if not self.rewrites_guide:
            return y
        highpass = highpass + self.upsample(self.content_encoder2(coarse), lowpass)
        return y, self.sharpen(guide, highpass)
