"""Every sampler with its definition: one output pixel at a time where that is feasible, from the equations of its paper.

A definition takes (module, x [N, C, H, W], guide or None) in float64 and reads nothing from the module but parameters.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import carafepp.conf
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

GROUPS = Path(next(iter(carafepp.conf.__path__)))


class Case(NamedTuple):
    group: str
    name: str
    options: dict
    definition: object

    @property
    def id(self):
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}[{options}]" if options else self.name

    @property
    def slot(self):
        return instantiate(OmegaConf.load(GROUPS / self.group / f"{self.name}.yaml"), **self.options)

    @property
    def guided(self):
        return getattr(self.slot.func, "needs_guide", False)

    def size(self, height, width):
        """Output size for a source of height x width."""
        return (2 * height, 2 * width) if self.group == "upsampler" else (-(-height // 2), -(-width // 2))


def each(shape):
    """Positions of a map of this shape."""
    return itertools.product(*map(range, shape))


def tent(x, row, column):
    """Bilinear reading of `x` [C, H, W] at a position in pixels, as sum_nm x_nm max(0, 1 - |row - n|) max(0, 1 - |column - m|)."""
    _, h, w = x.shape
    rows = (1 - (row.clamp(0, h - 1) - torch.arange(h)).abs()).clamp(min=0)
    columns = (1 - (column.clamp(0, w - 1) - torch.arange(w)).abs()).clamp(min=0)
    return torch.einsum("chw,h,w->c", x, rows, columns)


def read_at(x, offsets, size):
    """2x bilinear interpolation of `x` [N, C, H, W] moved by `offsets` [N, 2 (right, down), *size]."""
    y = x.new_zeros(*x.shape[:2], *size)
    for n, i, j in each((x.shape[0], *size)):
        right, down = offsets[n, :, i, j]
        y[n, :, i, j] = tent(x[n], (i + 0.5) / 2 - 0.5 + down, (j + 0.5) / 2 - 0.5 + right)
    return y


def conv(layer, x, **options):
    return F.conv2d(x, layer.weight, layer.bias, **options)


def nearest(_, x, guide=None):
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for i, j in each(y.shape[2:]):
        y[:, :, i, j] = x[:, :, i // 2, j // 2]
    return y


def bilinear(_, x, guide=None):
    size = 2 * x.shape[2], 2 * x.shape[3]
    return read_at(x, x.new_zeros(x.shape[0], 2, *size), size)


def nearest_conv(module, x, guide=None):
    return conv(module, nearest(None, x), padding=1)


def bilinear_conv(module, x, guide=None):
    return conv(module, bilinear(None, x), padding=1)


def deconv(module, x, guide=None):
    """Zeros between the pixels, then convolution with the flipped kernel."""
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    return F.conv2d(spread, module.weight.flip(2, 3).transpose(0, 1), module.bias, padding=1)


def pixel_shuffle(module, x, guide=None):
    depth = conv(module, x, padding=1)
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for c, i, j in each(y.shape[1:]):
        y[:, c, i, j] = depth[:, 4 * c + 2 * (i % 2) + j % 2, i // 2, j // 2]
    return y


def spatial_attention(module, x, guide=None):
    y = bilinear(None, x)
    return y / (1 + (-conv(module.attention, y, padding=1)).exp())


def gum(module, x, guide):
    h, w = guide.shape[2:]
    both = torch.cat([bilinear(None, x)[..., :h, :w], guide], 1)
    hidden = torch.einsum("oc,nchw->nohw", module.mix.weight[..., 0, 0], both) + module.mix.bias[:, None, None]
    offsets = torch.einsum("oc,nchw->nohw", module.offset.weight[..., 0, 0], hidden.clamp(min=0)) + module.offset.bias[:, None, None]
    return read_at(x, offsets, (h, w))


def dysample(module, x, guide=None):
    """Liu et al., section 3: offsets of shape 2g at the fine resolution, each group of channels read at its own."""
    g, size = module.groups, (2 * x.shape[2], 2 * x.shape[3])

    def shuffled(t):
        y = t.new_zeros(t.shape[0], t.shape[1] // 4, *size)
        for c, i, j in each(y.shape[1:]):
            y[:, c, i, j] = t[:, 4 * c + 2 * (i % 2) + j % 2, i // 2, j // 2]
        return y

    def linear(layer):
        return conv(layer, shuffled(x)) if module.style == "pl" else shuffled(conv(layer, x))

    offsets = linear(module.offset) * (0.25 if module.scope is None else 0.5 * linear(module.scope).sigmoid())
    width = x.shape[1] // g
    return torch.cat([read_at(x[:, i * width : (i + 1) * width], offsets[:, [i, g + i]], size) for i in range(g)], 1)


def indexnet(module, x, guide):
    """Four index blocks, one for each pixel of a 2x2 block."""
    h, w = guide.shape[2:]
    padded = F.pad(guide, (1, 1 + w % 2, 1, 1 + h % 2))
    y = nearest(None, x)
    for i, j in each((h, w)):
        block = module.index.weight[2 * (i % 2) + j % 2 :: 4]
        window = padded[:, :, i // 2 * 2 : i // 2 * 2 + 4, j // 2 * 2 : j // 2 * 2 + 4]
        y[:, :, i, j] /= 1 + (-torch.einsum("ochw,nchw->no", block, window)).exp()
    return y[..., :h, :w]


def sum_window(x, n, i, j, kernel):
    """Weighted sum of the window of x[n] around the source of fine pixel (i, j), with zeros outside the map."""
    k = kernel.shape[0]
    padded = F.pad(x[n], (k // 2,) * 4)
    return (padded[:, i // 2 : i // 2 + k, j // 2 : j // 2 + k] * kernel).sum((1, 2))


def a2u(module, x, guide):
    """Dai et al.: second-order features of the encoder, image by image."""
    n, c, h, w = guide.shape
    y = x.new_zeros(n, x.shape[1], h, w)
    even = F.pad(guide, (0, w % 2, 0, h % 2))
    for b in range(n):
        pooled = F.adaptive_avg_pool2d(guide[b], 6)
        features = []
        for which, norm in enumerate((module.norm_u, module.norm_v)):
            kernel = torch.einsum("c,chw->hw", module.filters.weight[which, :, 0, 0], pooled) + module.filters.bias[which]
            filtered = torch.cat([F.conv2d(channel[None, None], kernel[None, None], stride=2, padding=2)[0] for channel in even[b]])
            grouped = filtered.view(math.gcd(32, c), -1)
            normalised = (grouped - grouped.mean(1, keepdim=True)) / (grouped.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            scaled = normalised.view_as(filtered) * norm[0].weight[:, None, None] + norm[0].bias[:, None, None]
            features.append(torch.where(scaled > 0, scaled, 0.01 * scaled))
        affinity = (features[0] * features[1]).sum(0) / c**0.5
        vector = module.spread.weight[..., 0, 0] @ guide[b].mean((1, 2)) + module.spread.bias
        for i, j in each((h, w)):
            logits = torch.sigmoid(affinity[i // 2, j // 2] * vector[2 * (i % 2) + j % 2 :: 4])
            y[b, :, i, j] = sum_window(x, b, i, j, logits.softmax(0).view(3, 3))
    return y


def sapa(module, x, guide):
    """Lu et al.: kernel = softmax of the similarity of an encoder point and the decoder points around it."""

    def normalise(vector, layer):
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias

    n, _, h, w = guide.shape
    y = x.new_zeros(n, x.shape[1], h, w)
    for b, i, j in each((n, h, w)):
        query = module.query(normalise(guide[b, :, i, j], module.norm_guide))
        if module.gate is not None:
            source = x[b, :, i // 2, j // 2]
            gate = torch.sigmoid(module.gate(normalise(source, module.norm)))
            query = gate * query + (1 - gate) * module.query_coarse(source)
        similarity = x.new_zeros(5, 5)
        for dy, dx in each((5, 5)):
            row, column = i // 2 + dy - 2, j // 2 + dx - 2
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                similarity[dy, dx] = query @ module.key(normalise(x[b, :, row, column], module.norm))
        y[b, :, i, j] = sum_window(x, b, i, j, similarity.flatten().softmax(0).view(5, 5))
    return y


def fade(module, x, guide):
    """Lu et al.: semi-shift convolution, the encoder's window slides over fine pixels while the decoder's stays."""
    n, _, h, w = guide.shape
    en, de = F.pad(conv(module.compress_guide, guide), (1, 1, 1, 1)), F.pad(conv(module.compress, x), (1, 1, 1, 1))
    gate = torch.sigmoid(conv(module.gate, x))
    aligned = guide if guide.shape[1] == x.shape[1] else conv(module.align, guide)
    y = x.new_zeros(n, x.shape[1], h, w)
    weight = module.encoder.weight
    for b, i, j in each((n, h, w)):
        windows = en[b, :, i : i + 3, j : j + 3] + de[b, :, i // 2 : i // 2 + 3, j // 2 : j // 2 + 3]
        products = weight[:, 0] * windows if weight.shape[1] == 1 else weight * windows
        logits = products.flatten(1).sum(1) + 2 * module.encoder.bias
        g = gate[b, 0, i // 2, j // 2]
        y[b, :, i, j] = g * aligned[b, :, i, j] + (1 - g) * sum_window(x, b, i, j, logits.softmax(0).view(5, 5))
    return y


def carafe(module, x, guide=None):
    """Equations 1 to 3."""
    k, up, down, groups, normalizer = module.spec
    layer = module.content_encoder
    logits = conv(layer, module.compressor_norm(module.channel_compressor(x)), stride=down, padding=layer.padding, dilation=layer.dilation)
    size = (2 * x.shape[2], 2 * x.shape[3]) if up == 2 else (-(-x.shape[2] // 2), -(-x.shape[3] // 2))
    padded = F.pad(x, (k // 2,) * 4)
    width = x.shape[1] // groups
    y = x.new_zeros(*x.shape[:2], *size)
    for n, g, i, j in each((x.shape[0], groups, *size)):
        row, column = (i // 2, j // 2) if up == 2 else (2 * i, 2 * j)
        weights = logits[n, up * up * k * k * g : up * up * k * k * (g + 1), i // up, j // up][up * (i % up) + j % up :: up * up]
        if normalizer == "softmax":
            weights = weights.exp() / weights.exp().sum()
        elif normalizer.startswith("sigmoid"):
            weights = 1 / (1 + (-weights).exp())
            weights = weights / weights.sum() if normalizer == "sigmoid_normalized" else weights
        window = padded[n, g * width : (g + 1) * width, row : row + k, column : column + k]
        y[n, g * width : (g + 1) * width, i, j] = (window * weights.view(k, k)).sum((1, 2))
    return y


def pooled(x, first, last, pool):
    """Apply `pool` to the pixels [N, C, ...] of every window of rows and columns 2i + first to 2i + last that lie in the map."""
    size = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    y = x.new_zeros(*x.shape[:2], *size)
    for i, j in each(size):
        rows, columns = (slice(max(0, 2 * p + first), 2 * p + last + 1) for p in (i, j))
        y[:, :, i, j] = pool(x[:, :, rows, columns].flatten(2), (i, j), (rows, columns))
    return y


def max_pool(_, x, guide=None):
    return pooled(x, -1, 1, lambda window, *_: window.amax(2))


def avg_pool(_, x, guide=None):
    return pooled(x, -1, 1, lambda window, *_: window.mean(2))


def strided_conv(module, x, guide=None):
    return conv(module, x, padding=1)[:, :, ::2, ::2]


def blur_pool(_, x, guide=None):
    """Zhang: binomial filter over reflected borders, every other pixel."""
    h, w = x.shape[2:]
    y = x.new_zeros(*x.shape[:2], -(-h // 2), -(-w // 2))
    binomial = [1, 3, 3, 1]

    def reflected(p, size):
        return -p if p < 0 else 2 * (size - 1) - p if p >= size else p

    for (i, j), (a, b) in itertools.product(each(y.shape[2:]), each((4, 4))):
        y[:, :, i, j] += binomial[a] * binomial[b] / 64 * x[:, :, reflected(2 * i + a - 1, h), reflected(2 * j + b - 1, w)]
    return y


def soft_pool(_, x, guide=None):
    return pooled(x, 0, 1, lambda window, *_: (window.exp() * window).sum(2) / window.exp().sum(2))


def dpp(module, x, guide=None):
    """Saeedan et al., equations 3 to 6."""
    if isinstance(module.guide, torch.nn.Conv2d):
        smooth = F.conv2d(x, module.guide.weight, padding=1, groups=x.shape[1])[:, :, ::2, ::2]
    else:
        smooth = pooled(x, 0, 1, lambda window, *_: window.mean(2))
    alpha, power = module.log_alpha.exp()[:, None], module.log_lambda.exp()[:, None]

    def pool(window, position, _):
        difference = window - smooth[:, :, *position, None]
        if not module.symmetric:
            difference = difference.clamp(min=0)
        weights = alpha + (difference**2 + 1e-3).sqrt() ** power
        return (weights * window).sum(2) / weights.sum(2)

    return pooled(x, 0, 1, pool)


def lip(module, x, guide=None):
    """Gao et al., equation 6: normalised by the importances themselves."""
    hidden = x
    for layer in module.logits:
        if isinstance(layer, torch.nn.Conv2d):
            hidden = conv(layer, hidden, padding=layer.kernel_size[0] // 2)
        elif isinstance(layer, torch.nn.InstanceNorm2d):
            mean, variance = hidden.mean((2, 3), keepdim=True), hidden.var((2, 3), keepdim=True, correction=0)
            hidden = (hidden - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]
        elif isinstance(layer, torch.nn.ReLU):
            hidden = hidden.clamp(min=0)
    importance = (12 / (1 + (-hidden).exp())).exp()

    def pool(window, _, where):
        weights = importance[:, :, *where].flatten(2)
        return (weights * window).sum(2) / weights.sum(2)

    return pooled(x, -1, 1, pool)


def _cases(group, table):
    return [Case(group, name, options, definition) for name, definition, *variants in table for options in ({}, *variants)]


CASES = [
    *_cases(
        "upsampler",
        [
            ("nearest", nearest),
            ("bilinear", bilinear),
            ("nearest_conv", nearest_conv),
            ("bilinear_conv", bilinear_conv),
            ("deconv", deconv),
            ("pixel_shuffle", pixel_shuffle),
            ("spatial_attention", spatial_attention),
            ("gum", gum),
            ("dysample", dysample, {"style": "pl"}, {"dynamic_scope": True}, {"style": "pl", "groups": 8, "dynamic_scope": True}),
            ("indexnet", indexnet),
            ("a2u", a2u),
            ("sapa", sapa, {"gated": True, "embedding": 8}),
            ("fade", fade, {"lite": True}),
            (
                "carafe",
                carafe,
                {"compressed_channels": None, "normalizer": "sigmoid"},
                {"kernel_size": 3, "encoder_kernel": 1, "groups": 2, "normalizer": "sigmoid_normalized"},
                {"kernel_size": 7, "encoder_kernel": 5, "encoder_dilation": 2, "normalizer": "none"},
            ),
        ],
    ),
    *_cases(
        "downsampler",
        [
            ("max_pool", max_pool),
            ("avg_pool", avg_pool),
            ("strided_conv", strided_conv),
            ("blur_pool", blur_pool),
            ("soft_pool", soft_pool),
            ("dpp", dpp, {"symmetric": False}, {"guide": "full"}, {"guide": "full", "symmetric": False}),
            ("lip", lip, {"bottleneck": 8}),
            ("carafe", carafe, {"compressor_norm": True, "groups": 4}),
        ],
    ),
]
