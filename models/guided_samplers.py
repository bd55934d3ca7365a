"""Upsamplers that are guided by the finer map: IndexNet, A2U, SAPA and FADE predict kernels from it, GUM predicts where to sample.

The size of the guide is that of the output. It may be one pixel longer than 2H or 2W. GUM and IndexNet predict for its last row or column
as for any other, and read the last row or column of x there. A2U, SAPA and FADE predict the kernels from the first 2H x 2W pixels of the
guide, and their reassembled features repeat the last row or column, over which FADE blends the whole guide.

In A2U, SAPA and FADE, all channels share the kernel of a location, as in CARAFE:
`carafepp.kernels.reassemble` normalises the logits and sums the windows. SAPA's similarities are the derivative of such a sum with respect
to its weights.
"""

import functools
import math
import operator

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reassemble
from .adaptive_pooling import pool_cells
from .guides import Guided, cut_to_double, multiply_windows, pad_to_even, prepare_guide, space_to_depth, split_phases
from .point_samplers import sample
from .samplers import fit, shuffle_pixels, upsample_bilinear, upsample_nearest

torch.fx.wrap("cut_to_double")
torch.fx.wrap("fit")
torch.fx.wrap("multiply_windows")
torch.fx.wrap("prepare_guide")
torch.fx.wrap("sample")
torch.fx.wrap("shuffle_pixels")


@torch.fx.wrap
def _filter_images(images: Tensor, filters: Tensor) -> Tensor:
    """Filter every image with filters of its own, which its channels share, at stride 2.

    Args:
        images: [N, M, h, w] with even h and w.
        filters: [N, F, 6, 6].

    Returns:
        [N, F, M, h / 2, w / 2].
    """
    n, count, side, _ = filters.shape
    padding = side // 2 - 1
    if n == 0:
        # a convolution cannot have 0 groups
        return images.new_empty(0, count, images.shape[1], images.shape[2] // 2, images.shape[3] // 2)
    if isinstance(n, torch.SymInt) and torch.onnx.is_in_onnx_export():
        # the number of groups of a convolution is a constant in ONNX
        phases = split_phases(F.pad(images, (padding,) * 4))[:, None]  # [N, 1, M, h / 2 + 2, 2, w / 2 + 2, 2]
        slices = [slice(start, start - padding or None) for start in range(side // 2)]
        terms = (
            phases[..., slices[i // 2], i % 2, slices[j // 2], j % 2] * filters[:, :, i, j, None, None, None]
            for i in range(side)
            for j in range(side)
        )
        return functools.reduce(operator.add, terms)
    # images become groups, and channels the batch
    filtered = F.conv2d(images.transpose(0, 1), filters.flatten(0, 1)[:, None], stride=2, padding=padding, groups=n)
    return filtered.transpose(0, 1).unflatten(0, (n, count))


class GUM(Guided):
    """Guided upsampling (Mazzini, 2018): bilinear sampling at the regular positions plus a predicted offset per output pixel.

    A 1x1 convolution to C channels, ReLU and a 1x1 convolution to 2 predict the offsets, in source pixels, from the concatenation of the
    upsampled features and the guide. C (C + C_guide + 1) + 2 (C + 1) parameters, 131,842 for C = C_guide = 256, and as many multiply-adds
    per output pixel. The paper gives no formula. This form has the 132 K parameters and 1.1 M FLOPs per source pixel that the paper
    compares CARAFE with.
    """

    def __init__(self, channels: int, guide_channels: int | None = None):
        super().__init__(channels, guide_channels)
        self.mix = nn.Conv2d(channels + self.guide_channels, channels, 1)
        self.offset = nn.Conv2d(channels, 2, 1)
        # the layer starts as bilinear interpolation
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.get_parameter("bias"))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        coarse = fit(upsample_bilinear(x), guide.shape[2:])
        offsets = self.offset(self.mix(torch.cat([coarse, guide], dim=1)).relu())
        return sample(x, offsets[:, :, None])


class IndexNet(Guided):
    """Decoder side of IndexNet (Lu et al., 2019): nearest-neighbour interpolation times an index map in (0, 1) per element.

    The encoder side is `pooling.IndexPool`. The index map is the sigmoid of a 4x4 convolution of stride 2 from the guide to 4 C channels,
    rearranged from depth to space. This is the "many-to-one", linear form with context, the form that the papers of later upsamplers
    compare with. 64 C C_guide parameters, 4.2 M for 256; 16 C C_guide multiply-adds per output pixel.
    """

    def __init__(self, channels: int, guide_channels: int | None = None):
        super().__init__(channels, guide_channels)
        self.index = nn.Conv2d(self.guide_channels, 4 * channels, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        index = shuffle_pixels(self.index(pad_to_even(guide)).sigmoid())
        return fit(upsample_nearest(x), guide.shape[2:]) * fit(index, guide.shape[2:])


class A2U(Guided):
    """Affinity-aware upsampling (Dai et al., 2021): 3x3 kernels from second-order features of the guide. `A2UPool` is its encoder side.

    Two 6x6 filters, predicted from the pooled guide, filter all of its channels at stride 2. After group normalisation and leaky ReLU,
    the product of the two results, summed over channels, is one affinity per source pixel. A vector predicted from the mean of the guide
    spreads the affinity over the 36 weights of the pixel. The kernels are the softmax of the sigmoid of these weights. 42 C_guide + 38
    parameters; 18 C_guide + 9 C multiply-adds per output pixel.
    """

    kernel_size = 3
    filter_size = 6

    def __init__(self, channels: int, guide_channels: int | None = None):
        super().__init__(channels, guide_channels)
        width = self.guide_channels
        self.filters = nn.Conv2d(width, 2, 1)
        groups = math.gcd(32, width)
        self.norm_u, self.norm_v = (nn.Sequential(nn.GroupNorm(groups, width), nn.LeakyReLU()) for _ in range(2))
        self.spread = nn.Conv2d(width, 4 * self.kernel_size**2, 1)

    def spread_affinity(self, guide: Tensor) -> Tensor:
        """Compute the affinities of a fine map [N, guide_channels, h, w], spread to [N, 36, ceil(h / 2), ceil(w / 2)]."""
        filters = self.filters(pool_cells(guide, self.filter_size))  # [N, 2, 6, 6]
        u, v = _filter_images(pad_to_even(guide), filters).unbind(1)  # [N, guide_channels, ceil(h / 2), ceil(w / 2)]
        affinity = (self.norm_u(u) * self.norm_v(v)).sum(1, keepdim=True) / math.sqrt(self.guide_channels)
        return affinity * self.spread(F.adaptive_avg_pool2d(guide, 1))

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        size, guide = guide.shape[2:], cut_to_double(guide, x)
        logits = self.spread_affinity(guide).sigmoid()
        return reassemble(x, logits.to(x.dtype), kernel_size=self.kernel_size, up=2, size=size)


class SAPA(Guided):
    """Similarity-aware point affiliation (Lu et al., 2022): kernels are the similarities of a fine pixel to its coarse neighbours.

    Both maps are normalised over channels and embedded. The kernel is the softmax of the inner products of the fine pixel's embedding
    with those of its 5x5 window; pixels outside the map have similarity 0. About (C + C_guide + 2) E parameters for an embedding of E
    dimensions, and E (C / 4 + C_guide + 25) + 25 C multiply-adds per output pixel.

    Args:
        channels: C, the channels of x.
        guide_channels: channels of the guide; None means C.
        embedding: E, the dimensions of the embeddings.
        gated: whether the query is a mixture of both maps' embeddings with a weight per source pixel (SAPA-G).
    """

    kernel_size = 5

    def __init__(self, channels: int, guide_channels: int | None = None, embedding: int = 64, gated: bool = False):
        super().__init__(channels, guide_channels)
        self.norm_guide = nn.LayerNorm(self.guide_channels)
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(self.guide_channels, embedding)
        self.key = nn.Linear(channels, embedding)
        self.query_coarse = nn.Linear(channels, embedding) if gated else None
        self.gate = nn.Linear(channels, 1) if gated else None
        for layer in (self.query, self.key, self.query_coarse, self.gate):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def logits(self, x: Tensor, guide: Tensor) -> Tensor:
        """Compute the inner products of fine and coarse embeddings, [N, 25 * 4, H, W] in the layout of `reassemble`'s logits."""
        coarse = self.norm(x.movedim(1, -1))
        keys = self.key(coarse).movedim(-1, 1)  # [N, E, H, W]
        queries = pad_to_even(self.query(self.norm_guide(guide.movedim(1, -1))).movedim(-1, 1))  # [N, E, 2H, 2W]
        if self.gate is not None and self.query_coarse is not None:
            gate = self.gate(coarse).movedim(-1, 1).sigmoid()  # [N, 1, H, W]
            mixed = (1 - gate) * self.query_coarse(x.movedim(1, -1)).movedim(-1, 1)
            queries = upsample_nearest(gate) * queries + upsample_nearest(mixed)
        return multiply_windows(queries.to(keys.dtype), keys, self.kernel_size)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        logits = self.logits(x, cut_to_double(guide, x)).to(x.dtype)
        return reassemble(x, logits, kernel_size=self.kernel_size, up=2, size=guide.shape[2:])


class FADE(Guided):
    """FADE (Lu et al., 2022): CARAFE kernels predicted from both maps, and a gate that mixes in the guide.

    Guide and x, compressed to 64 channels, go through the same 3x3 encoder, each at its own resolution. The result for x is repeated to
    the fine resolution, and the sum of both is the logits of 5x5 kernels. out = g * guide + (1 - g) * reassembled, with one gate
    g = sigmoid(conv1x1(x)) per source pixel. 64 (C + C_guide) + C + 14,490 parameters, 47,514 for 256; 64 (C / 4 + C_guide) + 25 C + 18,000
    multiply-adds per output pixel. If the channels of guide and x differ, a 1x1 convolution changes those of the guide.

    Args:
        channels: C, the channels of x.
        guide_channels: channels of the guide; None means C.
        lite: whether to compress to the 25 logits and encode depthwise.
    """

    kernel_size = 5

    def __init__(self, channels: int, guide_channels: int | None = None, lite: bool = False):
        super().__init__(channels, guide_channels)
        taps = self.kernel_size**2
        width = taps if lite else 64
        self.compress_guide = nn.Conv2d(self.guide_channels, width, 1)
        self.compress = nn.Conv2d(channels, width, 1, bias=False)
        self.encoder = nn.Conv2d(width, taps, 3, padding=1, groups=taps if lite else 1)
        self.gate = nn.Conv2d(channels, 1, 1)
        self.align = nn.Identity() if self.guide_channels == channels else nn.Conv2d(self.guide_channels, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Upsample x [N, C, H, W] under guide [N, guide_channels, h, w] to [N, C, h, w]."""
        guide = prepare_guide(x, guide, self.guide_channels)
        size = guide.shape[2:]
        fine = self.encoder(self.compress_guide(cut_to_double(guide, x)))  # [N, 25, h, w], at most [N, 25, 2H, 2W]
        coarse = self.encoder(self.compress(x))  # [N, 25, H, W]
        logits = space_to_depth(fine) + coarse.repeat_interleave(4, dim=1)
        y = reassemble(x, logits.to(x.dtype), kernel_size=self.kernel_size, up=2, size=size)
        gate = fit(upsample_nearest(self.gate(x).sigmoid()), size)
        return gate * self.align(guide) + (1 - gate) * y
