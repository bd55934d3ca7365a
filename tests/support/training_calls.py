"""CARAFE modules, maps and training steps for tests of its gradients in half precision on a GPU."""

from copy import deepcopy

import torch
from carafepp.models.carafe import CARAFE
from torch import nn

NORM = {"down": 2, "kernel_size": 3, "compressor_norm": True, "compressed_channels": 6}


def make(channels=8, *, device="cpu", **options):
    """Return a module whose kernels are far from a box blur, and whose norm is far from the identity."""
    torch.manual_seed(0)
    module = CARAFE(channels, **options)
    nn.init.normal_(module.content_encoder.weight, std=0.1)
    for layer in (module.channel_compressor, module.content_encoder):
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                nn.init.uniform_(tensor, 0.5, 2)
    return module.to(device)


def draw(channels=8, *, n=2, height=8, width=6, dtype=torch.float16, device="cpu"):
    x = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype, memory_format=torch.channels_last)


def call_layers(module):
    """Return a copy of a module whose layers are called."""
    observed = deepcopy(module)
    observed.content_encoder.register_forward_hook(lambda *_: None)
    return observed


def run(module, x, *, dtype=torch.float16, function=None):
    """Return the output, the gradients of everything that needs one for a loss whose gradient differs everywhere, and the buffers."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=x.element_size() < 8):
        y = (module if function is None else function)(x)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum()
    gradients = torch.autograd.grad(loss, [x, *(p for p in module.parameters() if p.requires_grad)])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


def relative_error(value, exact):
    # the gradient of a bias before a norm is 0
    return ((value.double() - exact.double()).norm() / max(exact.double().norm(), 0.05)).item()
