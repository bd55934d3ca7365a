"""Changes of a CARAFE module under which its own layers are called, because launches that replace them would not see the change.

A new condition is added here, and the tests of every path that replaces layers check it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from carafepp.models.detection import freeze_norms
from torch import nn
from torch.nn.utils import prune

# a module with all layers
OPTIONS = {"down": 2, "kernel_size": 3, "compressor_norm": True, "compressed_channels": 6}
CONVOLUTIONS = ("channel_compressor", "content_encoder")
NORMS = ("compressor_norm", "compressor_norm.0", "compressor_norm.1")


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def hook_before(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def hook_gradient(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda *_: None)


def replace_forward(layer: nn.Module) -> None:
    layer.forward = layer.forward


def replace_convolution(layer: nn.Module) -> None:
    layer._conv_forward = nn.Conv2d._conv_forward.__get__(layer)


def replace_class(layer: nn.Module) -> None:
    layer.__class__ = type("Own", (type(layer),), {})


OBSERVERS = (hook, hook_before, hook_gradient, replace_forward, replace_convolution, replace_class)


def observe(change: Callable[[nn.Module], None], name: str) -> Callable[[nn.Module], None]:
    """Return the change of a layer as one of its module, with a name for reports."""

    def observed(module: nn.Module) -> None:
        change(module.get_submodule(name))

    observed.__name__ = f"{change.__name__}_of_{name}"
    return observed


class LowRank(nn.Module):
    """A layer with an update of low rank beside it, as in LoRA."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer, self.down = layer, nn.Conv2d(layer.in_channels, 2, 1)
        self.up = nn.Conv2d(2, layer.out_channels, 1, stride=layer.stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def normalize_weight(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module.content_encoder)


def normalize_weight_before(module: nn.Module) -> None:
    nn.utils.weight_norm(module.content_encoder)


def normalize_spectrum(module: nn.Module) -> None:
    nn.utils.parametrizations.spectral_norm(module.channel_compressor)


def leave_out_weights(module: nn.Module) -> None:
    prune.random_unstructured(module.content_encoder, "weight", 0.5)


def add_low_rank(module: nn.Module) -> None:
    module.content_encoder = LowRank(module.content_encoder)


def leave_out_bias(module: nn.Module) -> None:
    module.channel_compressor = nn.Conv2d(module.channel_compressor.in_channels, 6, 1, bias=False)


def leave_out_bias_of_the_encoder(module: nn.Module) -> None:
    module.content_encoder = nn.Conv2d(6, 9, 3, 2, 1, bias=False)


def reflect_borders(module: nn.Module) -> None:
    module.content_encoder = nn.Conv2d(6, 9, 3, 2, (1, 1), padding_mode="reflect")


def group_channels(module: nn.Module) -> None:
    module.content_encoder = nn.Conv2d(6, 9, 3, 2, 1, groups=3)


def widen_compressor(module: nn.Module) -> None:
    module.channel_compressor = nn.Conv2d(module.channel_compressor.in_channels, 6, 3, padding=1)


def follow_encoder(module: nn.Module) -> None:
    module.content_encoder = nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.Tanh())


# for every path
CHANGES = [observe(change, name) for name in CONVOLUTIONS for change in OBSERVERS]
CHANGES += [normalize_weight, normalize_weight_before, normalize_spectrum, leave_out_weights, add_low_rank, leave_out_bias]
CHANGES += [leave_out_bias_of_the_encoder, reflect_borders, group_channels, widen_compressor, follow_encoder]


def forget_statistics(module: nn.Module) -> None:
    module.compressor_norm[0] = nn.BatchNorm2d(6, track_running_stats=False).train(module.training)


def leave_out_affine_map(module: nn.Module) -> None:
    module.compressor_norm[0] = nn.BatchNorm2d(6, affine=False).train(module.training)


def normalize_groups(module: nn.Module) -> None:
    module.compressor_norm = nn.GroupNorm(2, 6)


def rectify_otherwise(module: nn.Module) -> None:
    module.compressor_norm[1] = nn.ReLU6()


# for the paths that replace the norm
CHANGES_OF_NORM = [observe(change, name) for name in NORMS for change in (hook, hook_before, replace_forward, replace_class)]
CHANGES_OF_NORM += [forget_statistics, leave_out_affine_map, normalize_groups, rectify_otherwise]


def take_statistics(module: nn.Module) -> None:
    for norm in module.compressor_norm:
        norm.eval().requires_grad_(False)


def synchronise_evaluation(module: nn.Module) -> None:
    module.compressor_norm = nn.SyncBatchNorm.convert_sync_batchnorm(module.compressor_norm)
    take_statistics(module)


# norms with fixed statistics and parameters, which launches replace
FROZEN = [take_statistics, synchronise_evaluation, freeze_norms]

# methods that a patch of a class may replace
METHODS = [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Module, "__call__")]
METHODS_OF_NORM = [(nn.BatchNorm2d, "forward"), (nn.ReLU, "forward"), (nn.Sequential, "forward")]


@contextmanager
def patched(owner: type[nn.Module], name: str) -> Iterator[list[nn.Module]]:
    """Patch a method of a class; list the modules for which it is called."""
    seen: list[nn.Module] = []
    own = getattr(owner, name)

    def call(self, *arguments, **options):
        seen.append(self)
        return own(self, *arguments, **options)

    with patch.object(owner, name, call):
        yield seen
