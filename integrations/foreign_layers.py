"""The layers of CARAFE in state dicts of other implementations: where they are, and their conversion into a module of this package.

The ports sum the same windows, with weights from the same two convolutions. They differ in names, in the layers between and after the
convolutions, and in the order of the encoder's channels.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.carafe import CARAFE

# names of the two convolutions: those of mmcv come first, then those of the port with batch norms and its descendants
COMPRESSORS = ("channel_compressor", "comp", "down", "compress_conv")
ENCODERS = ("content_encoder", "enc", "encoder", "encoder_conv")
# a convolution and its norm inside a block
BLOCKS = {"": "", ".conv": ".bn", ".0": ".1"}
# norms beside the blocks; those of this package come first
COMPRESSOR_NORMS = ("compressor_norm.0", "bn1")
ENCODER_NORMS = ("encoder_norm", "bn2", "bn")
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# what to do about a layer that only one side has
BUILD = {
    "channel_compressor": "compressed_channels=None is CARAFE without a compressor",
    "compressor_norm.0": "YoloCARAFE has a norm and an activation after the compressor, and CARAFE(..., compressor_norm=True) has a norm "
    "and ReLU; weights whose norms were fused into convolutions belong to neither",
    "encoder_norm": "only YoloCARAFE has a norm after the encoder; weights whose norms were fused into convolutions do not belong to it",
    "out": "ProjectedCARAFE has a 1x1 convolution after the reassembly, and YoloCARAFE if c1 and c2 differ",
}


class Part(NamedTuple):
    """The tensors of one module.

    Attributes:
        tensors: by their names in the module.
        moved: the name in the source, and the name in the module, of every tensor that was taken as it is or reordered.
        folded: the same of every tensor of a norm that was folded into a convolution, whose weight is named.
    """

    tensors: dict[str, Tensor]
    moved: dict[str, str]
    folded: dict[str, str]


def find_layers(state: Mapping[str, Tensor], place: str) -> dict[str, str] | None:
    """Find the layers of a CARAFE module in a state dict.

    Args:
        state: tensors by name.
        place: what precedes the names of the module's tensors.

    Returns:
        The names of layers of this package, without `place`, and those of the state dict, with `place`. None if no module is there.
    """
    layers = {}
    for ours, kinds, beside in (
        ("channel_compressor", COMPRESSORS, COMPRESSOR_NORMS),
        ("content_encoder", ENCODERS, ENCODER_NORMS),
    ):
        for kind, (conv, norm) in itertools.product(kinds, BLOCKS.items()):
            if f"{place}{kind}{conv}.weight" in state:
                layers[ours] = f"{place}{kind}{conv}"
                channels = state[f"{layers[ours]}.weight"].shape[:1]
                for each in (f"{kind}{norm}", *beside):
                    mean = state.get(f"{place}{each}.running_mean")
                    # a norm of other channels belongs to another layer
                    if mean is not None and mean.shape == channels:
                        layers.setdefault(beside[0], f"{place}{each}")
                break
    weights = [state[f"{layers[ours]}.weight"] for ours in ("channel_compressor", "content_encoder") if ours in layers]
    # only here can the compressor be omitted; the other names of encoders are those of many networks
    alone = layers.get("content_encoder") == f"{place}content_encoder"
    if "content_encoder" not in layers or (len(weights) == 1 and not alone) or any(weight.dim() != 4 for weight in weights):
        return None
    if len(weights) == 2 and weights[0].shape[0] != weights[1].shape[1]:
        return None
    if f"{place}out.weight" in state:
        layers["out"] = f"{place}out"
    return layers


def find_prefix(state: Mapping[str, Tensor], paths: Iterable[str]) -> str:
    """Find what precedes the names of a network in a state dict, by its CARAFE modules, whose paths end with a dot or are "".

    Raises:
        ValueError: the state dict has no CARAFE modules at these paths, or has them under several prefixes.
    """
    ends = [f"{kind}{conv}.weight" for kind in (*COMPRESSORS, "content_encoder") for conv in BLOCKS]
    starts = {name.removesuffix(end) for name in state for end in ends if name.endswith(end)}
    places = {place for place in starts if place[-1:] in ("", ".") and find_layers(state, place)}
    found = [{place.removesuffix(path) for place in places if f".{place}".endswith(f".{path}")} for path in paths]
    prefixes = set.intersection(*filter(None, found)) if any(found) else set()
    if "" in prefixes or len(prefixes) == 1:
        return "" if "" in prefixes else prefixes.pop()
    if prefixes:
        raise ValueError(f"prefix must be one of {', '.join(map(repr, sorted(prefixes)))}: the state dict has CARAFE under each")
    has = f"layers of CARAFE under the prefixes {', '.join(map(repr, sorted(places)))}" if places else "no layers of CARAFE"
    raise ValueError(
        f"the state dict has {has}, and the network has them under {', '.join(map(repr, paths))}; convert "
        "for the part of the network that these weights belong to, network.get_submodule(...)"
    )


def check_layers(layers: Mapping[str, str], module: CARAFE, place: str, activation: str | None, norm_eps: float | None) -> None:
    """Check that a module has the layers of the source, with the same arithmetic; `place` precedes the names of the source.

    Raises:
        ValueError: the layers or their arithmetic differ; the message names the layer and says what would be right.
    """
    own = {name for name, layer in module.named_modules() if not isinstance(layer, nn.Identity)}
    for ours, build in BUILD.items():
        # the norm after the encoder can be folded
        if ours in layers and ours not in own and ours != "encoder_norm":
            raise ValueError(f"the state dict has {layers[ours]!r}, for which the network has no layer: {build}")
        if ours in own and ours not in layers:
            raise ValueError(f"the network has the layer {ours!r} at {place!r}, for which the state dict has no tensors: {build}")
    for ours in ("compressor_norm.0", "encoder_norm"):
        if layers.get(ours, place + ours) != place + ours:
            if norm_eps is None:
                raise ValueError(
                    f"give norm_eps, the eps of {layers[ours]!r}, which no state dict holds: 1e-5 by default in PyTorch, 1e-3 in YOLOv5 "
                    "and ultralytics"
                )
            if ours in own and (eps := getattr(module.get_submodule(ours), "eps", None)) != norm_eps:
                raise ValueError(
                    f"norm_eps={norm_eps} for {layers[ours]!r}, and the norm of the network has eps={eps}; build it with the same"
                )
    # a block is a convolution with an activation, or may be what fusing has left of one
    compressor = layers.get("channel_compressor", "")
    after = layers.get("compressor_norm.0", compressor if compressor.endswith(tuple(filter(None, BLOCKS))) else None)
    if activation is None and after not in (None, f"{place}compressor_norm.0"):
        raise ValueError(
            f"give activation, the layer after {after!r}, which no state dict names: 'SiLU' in YOLOv5 and later, 'ReLU' in the port before "
            "it, or 'none'"
        )
    has = type(module.compressor_norm[1]).__name__ if isinstance(module.compressor_norm, nn.Sequential) else "none"
    if activation is not None and activation.lower() != has.lower():
        raise ValueError(
            f"activation={activation!r} at {place!r}, and the network has {has} there; build it as YoloCARAFE with this activation, or as "
            "CARAFE(..., compressor_norm=True), which has ReLU"
        )


def fold_norm(weight: Tensor, bias: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Fold a batch norm of evaluation into the convolution before it, in float64: weight [out, in, k, k], bias [out]."""
    mean, variance = norm["running_mean"].double(), norm["running_var"].double()
    scale = (variance + eps).rsqrt() * norm.get("weight", torch.ones_like(mean))
    return weight * scale[:, None, None, None], (bias - mean) * scale + norm.get("bias", torch.zeros_like(mean))


def convert_layers(
    state: Mapping[str, Tensor], layers: Mapping[str, str], module: CARAFE, *, norm_eps: float | None, sub_pixels_first: bool
) -> Part:
    """Convert the layers of a state dict, which `check_layers` has checked, into the tensors of a module."""
    own = module.state_dict()
    part = Part({}, {}, {})
    for ours, theirs in layers.items():
        for name in NORM_TENSORS:
            if f"{theirs}.{name}" in state and f"{ours}.{name}" in own:
                part.tensors[f"{ours}.{name}"] = state[f"{theirs}.{name}"]
                part.moved[f"{theirs}.{name}"] = f"{ours}.{name}"
        if f"{ours}.bias" in own and f"{ours}.bias" not in part.tensors:
            part.tensors[f"{ours}.bias"] = torch.zeros_like(own[f"{ours}.bias"])
    if "encoder_norm" in layers and "encoder_norm.weight" not in own:
        norm = {name: state[f"{layers['encoder_norm']}.{name}"] for name in NORM_TENSORS if f"{layers['encoder_norm']}.{name}" in state}
        part.folded.update({f"{layers['encoder_norm']}.{name}": "content_encoder.weight" for name in norm})
        weight, bias = (part.tensors[f"content_encoder.{name}"] for name in ("weight", "bias"))
        weight, bias = fold_norm(weight.double(), bias.double(), norm, norm_eps or 0.0)
        part.tensors.update({"content_encoder.weight": weight, "content_encoder.bias": bias})
    if sub_pixels_first:
        for name, tensor in part.tensors.items():
            # the caller reports other shapes
            if name.startswith(("content_encoder.", "encoder_norm.")) and tensor.dim() and tensor.shape == own[name].shape:
                taps = tensor.unflatten(0, (module.spec.up**2, -1))
                part.tensors[name] = taps.transpose(0, 1).flatten(0, 1)
    return part
