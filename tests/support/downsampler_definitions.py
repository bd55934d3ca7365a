"""Every downsampler by its definition: window by window, from the equations of its paper.

A definition takes (module, x [N, C, H, W], guide or None) in float64 and reads nothing from the module except parameters.
"""

import itertools

import torch
import torch.nn.functional as F
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
