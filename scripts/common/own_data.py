"""Values of a configuration that your own data determines, and its paths."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

# keys of conf/ whose values are files or folders
PATHS = ("root", "weights_root", "annotations", "images", "folder", "weights")


def read_own_data(cfg: DictConfig) -> None:
    """Replace `own_data` of a configuration by what it says about the data; a value that the configuration has already stays.

    Raises:
        InstantiationException: the files cannot be used.
    """
    if cfg.get("own_data") is not None:
        fill(cfg, instantiate(cfg.own_data))
    cfg.pop("own_data", None)


def fill(node: DictConfig, found: dict[str, Any]) -> None:
    """Set the values of `found` where a configuration has null."""
    for name, value in found.items():
        if node.get(name) is None:
            node[name] = value
        elif isinstance(value, dict):
            fill(node[name], value)


def make_paths_absolute(node: Any) -> None:
    """Make relative paths absolute in a resolved configuration, so that its checkpoints can be used from any folder."""
    if isinstance(node, DictConfig):
        for name, value in node.items():
            if isinstance(value, str) and name in PATHS and Path(value).exists():
                node[name] = str(Path(value).absolute())
            make_paths_absolute(value)
    elif isinstance(node, ListConfig):
        for value in node:
            make_paths_absolute(value)
