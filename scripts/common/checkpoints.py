"""Checkpoints of `carafepp-train`: read as they are, or as the task that they hold."""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from ...tasks.task import Task


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


def drop_weight_paths(config: object) -> object:
    """A resolved configuration whose networks read no weights to start from: a checkpoint brings all of them."""
    if isinstance(config, list):
        return [drop_weight_paths(value) for value in config]
    if not isinstance(config, dict):
        return config
    network = str(config.get("_target_")).startswith("carafepp.models.")
    return {key: None if network and key == "weights" else drop_weight_paths(value) for key, value in config.items()}


def load_task(path: str | Path, options: DictConfig | None = None) -> tuple[Task, DictConfig]:
    """Build the task of a checkpoint, with its weights, in evaluation mode, and return it with the run's configuration.

    `options` replace the task's own.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint (see `load_checkpoint`), or it does not fit the options.
    """
    checkpoint = load_checkpoint(path)
    config = OmegaConf.create(drop_weight_paths(checkpoint["config"]))
    config.task = OmegaConf.merge(config.task, options or {})
    task = hydra.utils.instantiate(config.task)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint={path} does not fit a task with {options or 'its own options'}: {error}") from error
    return task.eval(), config


def relocate(config: object, root: str, new: str) -> object:
    """A resolved configuration whose paths in the folder `root` are in `new`."""
    if isinstance(config, list):
        return [relocate(value, root, new) for value in config]
    if isinstance(config, dict):
        return {key: relocate(value, root, new) for key, value in config.items()}
    inside = isinstance(config, str) and f"{config}/".startswith(f"{root.rstrip('/')}/")
    return f"{new.rstrip('/')}{config[len(root.rstrip('/')) :]}" if inside else config


def data_of_run(run: DictConfig, options: DictConfig) -> DictConfig:
    """The data of a run, with options; `root` is where its files are now.

    Raises:
        ValueError: there is a `root`, and the run's data is in no folder.
    """
    if "root" in options:
        if run.data.get("root") is None:
            raise ValueError(f"data.root={options.root}: the run's data is in no folder, {run.data.val._target_} makes it")
        run.data = relocate(OmegaConf.to_container(run.data, resolve=True), run.data.root, options.root)
    return OmegaConf.merge(run.data, options)
