"""Your own code on the command line: modules in the working folder are imported, and a class becomes a sampler of a slot."""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from .trust import find_foreign

# the targets of the files `published` and `shared`, which are called without channels
NOT_SAMPLERS = ("carafepp.models.samplers.published", "carafepp.models.samplers.shared")


def admit_own_code(cfg: DictConfig) -> None:
    """Prepare a composed configuration that may name your own code.

    - The working folder becomes the last place to import modules from, if the configuration or `trust=` names a module in it. Without such
      a name, nothing is imported from the folder, whose files may come from elsewhere.
    - A sampler without `_partial_` gets `_partial_: true`, because a slot takes a function of the channels.
    """
    names = {*find_foreign(OmegaConf.to_container(cfg))}
    trust = OmegaConf.select(cfg, "trust", default=[])
    search_working_folder(names.union([trust] if isinstance(trust, str) else trust))
    with open_dict(cfg):
        for group, choice in HydraConfig.get().runtime.choices.items():
            name, _, package = group.partition("@")
            if name in ("upsampler", "downsampler") and choice is not None:
                complete_sampler(OmegaConf.select(cfg, package or name))


def search_working_folder(names: Iterable[str]) -> None:
    """Append the working folder to `sys.path` if one of the import paths begins with a module or package in it, and with no other."""
    folder = Path.cwd()
    for top in {name.partition(".")[0] for name in names}:
        own = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
        if own and str(folder) not in sys.path and top.isidentifier() and importlib.util.find_spec(top) is None:
            sys.path.append(str(folder))


def complete_sampler(sampler: DictConfig) -> None:
    """Let the class of a sampler take the channels later, unless the sampler says whether it does."""
    if sampler is not None and "_partial_" not in sampler and sampler.get("_target_") not in NOT_SAMPLERS:
        sampler._partial_ = True
        # an option of the file `shared`, which the class has replaced
        sampler.pop("slot", None)
