"""What the Hydra applications share: hints for a configuration that cannot be composed, and run folders that one process owns."""

import contextlib
import difflib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..tasks.task import Task


def app(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a Hydra application of `carafepp.conf`'s `config_name`; a misspelt key is answered with the keys there are."""

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        run = hydra.main(version_base="1.3", config_path="pkg://carafepp.conf", config_name=config_name)(task)

        @functools.wraps(task)
        def main() -> None:
            try:
                run()
            except SystemExit as stop:
                if stop.code:
                    print(*hints(config_name, sys.argv[1:]), sep="\n", file=sys.stderr)
                raise

        return main

    return decorate


def hints(config_name: str, arguments: list[str]) -> list[str]:
    """Say of each override whose key does not exist which keys do."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("carafepp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group != "hydra"]
        try:
            overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and a[0] not in "-+~"])
            chosen = [o.input_line for o in overrides if o.key_or_group.split("@")[0] in groups and not o.is_sweep_override()]
            config = hydra.compose(config_name, overrides=chosen)
        except HydraException:
            return []
    lines = []
    for override in overrides:
        key, node = override.key_or_group, config
        if key.split("@")[0] in groups or key.startswith("hydra"):
            continue
        parts = key.split(".")
        for depth, part in enumerate(parts):
            # not `part in node`, which denies a key whose mandatory value is missing
            items = range(len(node)) if isinstance(node, ListConfig) else sorted(node) if isinstance(node, DictConfig) else []
            known = {str(item): item for item in items}
            if part not in known:
                close = difflib.get_close_matches(part, [*known, *(groups if depth == 0 else [])], n=1)
                where = f"'{'.'.join(parts[:depth])}'" if depth else "the configuration"
                lines.append(f"{key}: '{part}' is not in {where}" + (f"; did you mean '{close[0]}'?" if close else "."))
                lines.append(f"  keys of {where}: {', '.join(known)}" if known else f"  {where} has none; add it: +{override.input_line}")
                if depth == 0:
                    lines.append(f"  groups (group=choice): {', '.join(groups)}")
                break
            node = None if OmegaConf.is_missing(node, known[part]) else node[known[part]]
    return lines


def quiet() -> None:
    """Leave out what Lightning says of hardware, tips and its own internals; its warnings about the run stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # it is: the data module's state is the position in the stream
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", message="The `srun` command is available")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the run folder for the first process of a run, and with it for the others.

    Raises:
        RuntimeError: another process holds it.
    """
    if rank_zero_only.rank > 0:
        yield
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"{folder} is in use by another run: wait for it, or choose another folder with hydra.run.dir=") from None


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of `carafepp-train`: tensors and primitives, with the run's configuration under "config".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of carafepp-train, or damaged.
    """
    path, wanted = Path(path), "give the last.ckpt or best.ckpt of a run folder"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={path} {'is a folder' if path.is_dir() else 'does not exist'}; {wanted}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint={path} cannot be read ({error}); {wanted}") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise ValueError(f"checkpoint={path} was not written by carafepp-train, it holds no configuration; {wanted}")
    return checkpoint


def trained(config: object) -> object:
    """A resolved configuration whose networks read no weights to start from: a checkpoint brings all of them."""
    if isinstance(config, list):
        return [trained(value) for value in config]
    if not isinstance(config, dict):
        return config
    network = str(config.get("_target_")).startswith("carafepp.models.")
    return {key: None if network and key == "weights" else trained(value) for key, value in config.items()}


def load_task(path: str | Path, options: DictConfig | None = None) -> tuple[Task, DictConfig]:
    """Build the task of a checkpoint, with its weights, in evaluation mode, and return it with the run's configuration.

    `options` replace the task's own.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint (see `load_checkpoint`), or it does not fit the options.
    """
    checkpoint = load_checkpoint(path)
    config = OmegaConf.create(trained(checkpoint["config"]))
    config.task = OmegaConf.merge(config.task, options or {})
    task = hydra.utils.instantiate(config.task)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint={path} does not fit a task with {options or 'its own options'}: {error}") from error
    return task.eval(), config
