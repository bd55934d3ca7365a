"""Every upsampler without a guide, by its definition: one output pixel at a time where that is feasible, from the equations of its paper.

A definition takes (module, x [N, C, H, W], guide or None) in float64 and reads nothing from the module except parameters.
"""

import itertools

import torch
import torch.nn.functional as F


def each(shape):
    """Positions of a map of this shape."""
    return itertools.product(*map(range, shape))


def tent(x, row, column):
    """Bilinear reading of `x` [C, H, W] at a position in pixels, as sum_nm x_nm max(0, 1 - |row - n|) max(0, 1 - |column - m|)."""
    _, h, w = x.shape
    rows = (1 - (row.clamp(0, h - 1) - torch.arange(h)).abs()).clamp(min=0)
    columns = (1 - (column.clamp(0, w - 1) - torch.arange(w)).abs()).clamp(min=0)
    return torch.einsum("chw,h,w->c", x, rows, columns)


def read_at(x, offsets, size, up=2):
    """Bilinear interpolation by `up` of `x` [N, C, H, W] moved by `offsets` [N, 2 (right, down), *size]."""
    y = x.new_zeros(*x.shape[:2], *size)
    for n, i, j in each((x.shape[0], *size)):
        right, down = offsets[n, :, i, j]
        y[n, :, i, j] = tent(x[n], (i + 0.5) / up - 0.5 + down, (j + 0.5) / up - 0.5 + right)
    return y


def fit(y, size):
    """`y` cut at the bottom and right to `size`, or with its last row and column repeated."""
    rows, columns = (torch.arange(side).clamp(max=last - 1) for side, last in zip(size, y.shape[2:], strict=True))
    return y[..., rows[:, None], columns]


def inside(guide, x):
    """The pixels of `guide` that belong to a pixel of `x`."""
    return guide[..., : 2 * x.shape[2], : 2 * x.shape[3]]


def conv(layer, x, **options):
    return F.conv2d(x, layer.weight, layer.bias, **options)


def sum_window(x, n, i, j, kernel, up=2):
    """Weighted sum of the window of x[n] around the source of fine pixel (i, j), with zeros outside the map."""
    k = kernel.shape[0]
    padded = F.pad(x[n], (k // 2,) * 4)
    return (padded[:, i // up : i // up + k, j // up : j // up + k] * kernel).sum((1, 2))


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


def dlu(module, x, guide=None):
    """Fu et al.: a kernel for each source pixel, read bilinearly at the source pixel of the target plus an offset."""
    compressed = conv(module.channel_compressor, x)
    kernels = conv(module.kernel_space_generator, compressed, padding=1).exp()
    kernels = kernels / kernels.sum(1, keepdim=True)
    offsets = conv(module.conv_offset, compressed, padding=1)
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for n, i, j in each((x.shape[0], *y.shape[2:])):
        right, down = offsets[n, 2 * (i % 2) + j % 2 :: 4, i // 2, j // 2]
        kernel = tent(kernels[n], i // 2 + down, j // 2 + right)
        y[n, :, i, j] = sum_window(x, n, i, j, kernel.view(module.kernel_size, module.kernel_size))
    return y


def lda_aqu(module, x, guide=None):
    """Du et al., section 3: attention of each target to K x K neighbours that its query moves, corners aligned, zeros outside."""

    def normalise(layer, t):
        centred = t - t.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]

    def read(t, row, column):
        padded = F.pad(t, (1, 1, 1, 1))
        return tent(padded, row + 1, column + 1)

    (n, c, h, w), groups, points = x.shape, module.groups, module.relative_position_bias_table.shape[0]
    normalised = normalise(module.layer_norm, x)
    q, k = conv(module.proj_q, normalised), conv(module.proj_k, normalised)
    e, side = q.shape[1], round(points**0.5)
    rows, columns = torch.arange(2 * h).double() * (h - 1) / (2 * h - 1), torch.arange(2 * w).double() * (w - 1) / (2 * w - 1)
    fine = torch.stack([torch.stack([torch.stack([tent(q[b], r, s) for s in columns], -1) for r in rows], -2) for b in range(n)])
    depthwise, norm, _, last = module.conv_offset
    offsets = []
    for g in range(groups):
        hidden = normalise(norm, conv(depthwise, fine[:, g * e // groups : (g + 1) * e // groups], padding=1, groups=e // groups))
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        offsets.append(module.offset_range * torch.tanh(conv(last, hidden, padding=1)))
    y = x.new_zeros(n, c, 2 * h, 2 * w)
    for b, i, j in each((n, 2 * h, 2 * w)):
        logits, values = [], []
        for t in range(points):
            key, value = [], []
            for g in range(groups):
                down, right = offsets[g][b, 2 * t : 2 * t + 2, i, j]
                row = (i + t // side - side // 2 + down) * (h - 1) / (2 * h - 1)
                column = (j + t % side - side // 2 + right) * (w - 1) / (2 * w - 1)
                key.append(read(k[b, g * e // groups : (g + 1) * e // groups], row, column))
                value.append(read(x[b, g * c // groups : (g + 1) * c // groups], row, column))
            logits.append(fine[b, :, i, j] @ (torch.cat(key) + module.relative_position_bias_table[t]) / e**0.5)
            values.append(torch.cat(value))
        y[b, :, i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return y


def carafe(module, x, guide=None):
    """Equations 1 to 3."""
    k, up, down, groups, normalizer, _ = module.spec
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
