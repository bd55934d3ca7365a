"""Configurations as the commands compose them, without running a command."""

from functools import partial
from pathlib import Path

import carafepp.conf
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

CONF = Path(carafepp.conf.__path__[0])


def compose_config(name: str, *overrides: str, with_hydra: bool = False) -> DictConfig:
    """Compose the configuration that `carafepp-NAME` gets with these overrides, with or without that of Hydra itself."""
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=with_hydra)


def choices(group: str) -> list[str]:
    """Names of the files of a configuration group, such as "upsampler" or "row/table1"."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def configured_sampler(group: str, name: str) -> partial[nn.Module] | None:
    """Instantiate a file of `upsampler` or `downsampler`: what makes a sampler of a number of channels, or None for the network's own."""
    return instantiate(OmegaConf.load(CONF / group / f"{name}.yaml"))
