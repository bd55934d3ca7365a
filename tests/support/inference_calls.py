"""CARAFE modules and maps for tests of its inference in half precision on a GPU."""

import torch
import training_calls

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
    return training_calls.make(channels, **options).train(trained).requires_grad_(trained)


def draw(channels=16, *, height=5, **options):
    return training_calls.draw(channels, height=height, **options)


def infer(module, x):
    with torch.no_grad(), torch.autocast(x.device.type, torch.float16):
        return module(x)
