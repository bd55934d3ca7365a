"""CARAFE modules and maps for tests of its inference in half precision on a GPU."""

import torch
from carafepp.models.carafe import CARAFE
from torch import nn

OPTIONS = [
    {"up": 2, "kernel_size": 3, "groups": 2, "encoder_dilation": 2, "border": "renormalize", "compressed_channels": 6},
    {"down": 2, "compressed_channels": None, "normalizer": "sigmoid"},
    # features without room in the output, and borders that are read tap by tap
    {"down": 2, "compressor_norm": True, "compressed_channels": 40, "border": "replicate"},
    # two blocks of columns in both products
    {"up": 4, "kernel_size": 3, "encoder_kernel": 1, "compressed_channels": 144},
]
# the paper's, which take long in the interpreter
PUBLISHED = [{"up": 2}, {"down": 2, "compressor_norm": True}, {"up": 3, "down": 2, "encoder_kernel": 5}]
NORM = {"down": 2, "compressor_norm": True, "compressed_channels": 6}


def make(channels, *, trained=False, **options):
    """Return a module whose kernels are far from a box blur, and whose norm is far from the identity."""
    torch.manual_seed(0)
    module = CARAFE(channels, **options).train(trained).requires_grad_(trained)
    nn.init.normal_(module.content_encoder.weight, std=0.1)
    for layer in (module.channel_compressor, module.content_encoder):
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                nn.init.uniform_(tensor, 0.5, 2)
    return module


def draw(channels=16, *, n=2, height=5, width=6, dtype=torch.float16, device="cpu"):
    x = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype, memory_format=torch.channels_last)


def infer(module, x):
    with torch.no_grad(), torch.autocast(x.device.type, torch.float16):
        return module(x)
