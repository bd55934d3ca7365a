"""Every downsampler by its definition: window by window, from the equations of its paper.

A definition takes (module, x [N, C, H, W], guide or None) in float64 and reads nothing from the module except parameters.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from guided_upsampler_definitions import affinities
from upsampler_definitions import conv, each


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


def max_blur_pool(module, x, guide=None):
    """Zhang, section 3: the maximum of each 2x2 window of an even map, then the filter; odd sides repeat their last pixel."""
    rows, columns = (torch.arange(side + side % 2).clamp(max=side - 1) for side in x.shape[2:])
    even = x[:, :, rows[:, None], columns]
    corners = [even[:, :, a : a + even.shape[2] - 1, b : b + even.shape[3] - 1] for a, b in each((2, 2))]
    maxima = torch.stack(corners).amax(0)
    if 1 in even.shape[2:]:
        return maxima
    h, w = maxima.shape[2:]
    y = x.new_zeros(*x.shape[:2], (h + 1) // 2, (w + 1) // 2)
    reflect = min(h, w) > 2

    def inside(p, size):
        if reflect:
            return -p if p < 0 else 2 * (size - 1) - p if p >= size else p
        return min(max(p, 0), size - 1)

    for (i, j), (a, b) in itertools.product(each(y.shape[2:]), each((4, 4))):
        y[:, :, i, j] += [1, 3, 3, 1][a] * [1, 3, 3, 1][b] / 64 * maxima[:, :, inside(2 * i + a - 1, h), inside(2 * j + b - 1, w)]
    return y


def flc_pool(_, x, guide=None):
    """Grabinski et al., section 3: the sum of the waves of low frequencies, at every other position."""
    h, w = x.shape[2:]
    size = -(-h // 2), -(-w // 2)
    y = torch.zeros(*x.shape[:2], *size, dtype=torch.complex128)
    rows, columns = torch.arange(h).double()[:, None], torch.arange(w).double()
    for u, v in each(size):
        # from -ceil(size / 2) / 2 on
        u, v = u - size[0] // 2, v - size[1] // 2
        amplitude = (x * torch.exp(-2j * math.pi * (u * rows / h + v * columns / w))).mean((2, 3))
        coarse_rows, coarse_columns = torch.arange(size[0]).double()[:, None] / size[0], torch.arange(size[1]).double() / size[1]
        y += amplitude[..., None, None] * torch.exp(2j * math.pi * (u * coarse_rows + v * coarse_columns))
    return (y.real**2 + y.imag**2).sqrt()


def block_pixels(x, i, j):
    """The pixels of block (i, j), [N, C, 2, 2]; 0 outside the map."""
    return F.pad(x, (0, 1, 0, 1))[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]


def spd_conv(module, x, guide=None):
    """Sunkara and Luo, section 3.1: sub-maps (0, 0), (1, 0), (0, 1), (1, 1) become channels; then a convolution of stride 1."""
    size = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    depth = x.new_zeros(x.shape[0], 4 * x.shape[1], *size)
    for i, j in each(size):
        block = block_pixels(x, i, j)
        depth[:, :, i, j] = torch.cat([block[..., 0, 0], block[..., 1, 0], block[..., 0, 1], block[..., 1, 1]], 1)
    return conv(module.conv, depth, padding=module.conv.padding)


def hwd(module, x, guide=None):
    """Xu et al., section 3: the products of the block with the outer products of the Haar filters, then convolution, norm and ReLU."""
    low, high = torch.tensor([[1, 1], [1, -1]]).double() / 2**0.5
    size = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    depth = x.new_zeros(x.shape[0], 4 * x.shape[1], *size)
    for i, j in each(size):
        filters = (torch.outer(low, low), torch.outer(high, low), torch.outer(low, high), torch.outer(high, high))
        depth[:, :, i, j] = torch.cat([(block_pixels(x, i, j) * kernel).sum((2, 3)) for kernel in filters], 1)
    mixed, norm = conv(module.conv_bn_relu[0], depth), module.conv_bn_relu[1]
    mean, variance = mixed.mean((0, 2, 3)), mixed.var((0, 2, 3), correction=0)
    normalised = (mixed - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return (normalised * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def index_pool(module, x, guide=None):
    """Lu et al., section 3.3: four index blocks, one for each pixel of a 2x2 block; softmax of their sigmoids weighs the pixels."""
    h, w = x.shape[2:]
    padded = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))

    def pool(window, position, where):
        i, j = position
        rows, columns = window_size(where, x)
        indices = []
        for a, b in each((rows, columns)):
            patch = padded[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
            indices.append(torch.sigmoid(torch.einsum("ochw,nchw->no", module.index.weight[2 * a + b :: 4], patch)))
        return (torch.stack(indices, 2).softmax(2) * window).sum(2)

    return pooled(x, 0, 1, pool)


def window_size(where, x):
    """Rows and columns of a window that lie in the map."""
    return tuple(len(range(*part.indices(side))) for part, side in zip(where, x.shape[2:], strict=True))


def a2u_pool(module, x, guide=None):
    """Dai et al.: softmax over 6x6 pixels of the affinity of each output pixel, spread by a vector of the image."""
    h, w = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    y = x.new_zeros(*x.shape[:2], h, w)
    for b in range(x.shape[0]):
        affinity, vector = affinities(module, x[b])
        padded = F.pad(x[b], (2, 3, 2, 3))
        for i, j in each((h, w)):
            weights = (affinity[i, j] * vector).softmax(0).view(6, 6)
            y[b, :, i, j] = (padded[:, 2 * i : 2 * i + 6, 2 * j : 2 * j + 6] * weights).sum((1, 2))
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
