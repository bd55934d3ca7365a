"""Loading of trained weights into a network, from torchvision's ImageNet classifiers or from checkpoints of `carafepp-train`."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

logger = logging.getLogger(__name__)

# torchvision's names of weights
WEIGHTS_NAME = re.compile(r"\w+_Weights\.\w+")


class Loaded(NamedTuple):
    """The names of tensors, sorted by what happened to them in loading.

    Attributes:
        loaded: tensors copied from the file.
        initialised: tensors of the network that keep their initial values.
        unused: tensors of the file that the network does not use.
    """

    loaded: list[str]
    initialised: list[str]
    unused: list[str]


def is_whole(path: str | Path) -> bool:
    """Return whether a file of `torch.save` is a complete archive whose parts have their checksums, which PyTorch does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False


def explain_unreadable(error: Exception) -> str:
    """Say in a line why torch.load did not read a file as tensors, without its advice to run the code that the file may hold."""
    reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return (reason.strip().splitlines() or [type(error).__name__])[0].partition(". Please")[0]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, or from a checkpoint, without changing names.

    The name of torchvision's weights, such as "ResNet50_Weights.IMAGENET1K_V2", downloads them once (see `download_state`).

    Raises:
        FileNotFoundError: the file does not exist, or weights cannot be downloaded.
        ValueError: the file cannot be read as tensors and primitives, or does not hold a state dict.
    """
    if not Path(path).is_file():
        if WEIGHTS_NAME.fullmatch(str(path)):
            return download_state(str(path))
        raise FileNotFoundError(
            f"weights={path} does not exist; give a state dict, the last.ckpt or best.ckpt of a run folder, or a name of torchvision's "
            "weights, such as ResNet50_Weights.IMAGENET1K_V2"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # the type of error for a damaged file depends on the place of the damage
    except Exception as error:
        raise ValueError(f"weights={path} cannot be read: {explain_unreadable(error)}") from error
    # files of PyTorch before 1.6 are no archives and have no checksums
    if zipfile.is_zipfile(path) and not is_whole(path):
        raise ValueError(f"weights={path} is damaged: a part does not have its checksum")
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights={path} does not hold a state dict of tensors")
    return dict(state)


def download_state(name: str) -> dict[str, Tensor]:
    """Download weights that torchvision publishes under a name, or read them from the cache of `torch.hub` (TORCH_HOME).

    Raises:
        ValueError: torchvision has no weights of this name.
        FileNotFoundError: the weights cannot be downloaded.
    """
    try:
        weights = get_weight(name)
    except (ValueError, KeyError) as error:
        raise ValueError(f"weights={name} is not a name of torchvision's weights, such as ResNet50_Weights.IMAGENET1K_V2") from error
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise FileNotFoundError(f"weights={name} cannot be downloaded from {weights.url} ({error}); give a file instead") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a backbone or classifier from a state dict or from a checkpoint of `carafepp-train`.

    If the network has a `backbone`, only the weights of the backbone are returned.

    Raises:
        FileNotFoundError, ValueError: see `read_state`.
    """
    state = read_state(path)
    for prefix in ("model.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state


def load_weights(network: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> Loaded:
    """Copy the tensors that `weights` and `network` share, and log how many were copied and which were not.

    Samplers that are not in the file keep their initial values, as does a classifier `fc` with another number of classes. Initial values
    in any other layer than `fc` are a warning, because a network is meant to start from a classifier with the same samplers.

    Args:
        network: receives the tensors.
        weights: a file, see `read_weights`, or a state dict.

    Raises:
        FileNotFoundError, ValueError: see `read_weights`; or no tensor is shared, or tensors of the same name differ in shape.
    """
    state = dict(weights) if isinstance(weights, Mapping) else read_weights(weights)
    source = "the state dict" if isinstance(weights, Mapping) else f"weights={weights}"
    own = network.state_dict()
    differ = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong := [name for name in differ if not name.startswith("fc.")]:
        shapes = f"{wrong[0]} is {list(state[wrong[0]].shape)} there and {list(own[wrong[0]].shape)} in the network"
        raise ValueError(f"{source} belongs to another network: {len(wrong)} tensors differ in shape, {shapes}")
    loaded = [name for name in own if name in state and name not in differ]
    if not loaded:
        raise ValueError(f"{source} has no tensor in common with the network, which has {', '.join(list(own)[:3])}, ...")
    try:
        network.load_state_dict({name: state[name] for name in loaded}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the network: {error}") from error
    report = Loaded(loaded, [name for name in own if name not in loaded], [name for name in state if name not in loaded])
    logger.info("%d of %d tensors loaded from %s", len(loaded), len(own), source)
    if report.unused:
        logger.info("not used: %s", _list_layers(report.unused))
    if random := [name for name in report.initialised if not (name.startswith("fc.") or name.endswith("num_batches_tracked"))]:
        logger.warning("%s has no weights for %d tensors, which start at random: %s", source, len(random), _list_layers(random))
    return report


def _list_layers(names: Iterable[str]) -> str:
    """List the layers of tensors with these names."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names))
