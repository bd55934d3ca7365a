"""Reading of checkpoints of `carafepp-train`, and construction of the task and the data of their runs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...models.weights import explain_unreadable, is_whole
from ...tasks.task import Task
from .failures import describe_error
from .trust import check_config


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of `carafepp-train`: tensors and primitives, with the run's configuration under "config".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of carafepp-train.
    """
    path, wanted = Path(path), "give the last.ckpt or best.ckpt of a run folder"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={path} {'is a folder' if path.is_dir() else 'does not exist'}; {wanted}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint={path} cannot be read ({explain_unreadable(error)}); {wanted}") from error
    if not is_whole(path):
        raise ValueError(f"checkpoint={path} is damaged: a part does not have its checksum; {wanted}")
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"checkpoint={path} was not written by carafepp-train: it holds no configuration or no weights; {wanted}")
    return checkpoint


def check_last_checkpoint(folder: Path) -> None:
    """Check that last.ckpt of a run folder can be continued from.

    Raises:
        ValueError: the file is damaged. The message offers best.ckpt, an earlier checkpoint of the run, if that is whole.
    """
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if is_whole(last):
        return
    ways = [f"delete it to train from the start (rm '{last}')"]
    if best.is_file() and is_whole(best):
        ways.insert(0, f"replace it by {best}, an earlier checkpoint of the same run (cp '{best}' '{last}')")
    raise ValueError(f"{last} is damaged: {', or '.join(ways)}, then continue with carafepp-train resume={folder}")


def drop_weight_paths(config: Any) -> Any:
    """Copy a resolved configuration without the files of initial weights of its networks, because a checkpoint replaces these weights."""
    if isinstance(config, list):
        return [drop_weight_paths(value) for value in config]
    if not isinstance(config, dict):
        return config
    network = str(config.get("_target_")).startswith("carafepp.models.")
    return {key: None if network and key == "weights" else drop_weight_paths(value) for key, value in config.items()}


def load_task(path: str | Path, options: DictConfig | None = None, trust: str | Iterable[str] = ()) -> tuple[Task, DictConfig]:
    """Build the task of a checkpoint with its weights, and return it, in evaluation mode, with the configuration of the run.

    Args:
        options: options of the task that replace those of the run.
        trust: modules and import paths that the checkpoint may name in addition to those in conf/.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint (see `load_checkpoint`), its configuration names something that is not trusted (see
            `check_config`) or does not build a task with these options, or its weights do not fit the task.
    """
    checkpoint = load_checkpoint(path)
    check_config(checkpoint["config"], trust, f"checkpoint={path}")
    told = options or "its own options"
    try:
        config = cast(DictConfig, OmegaConf.create(drop_weight_paths(checkpoint["config"])))
        config.task = OmegaConf.merge(config.task, options or {})
        task = hydra.utils.instantiate(config.task)
    except (InstantiationException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint={path} holds no configuration of a task with {told}: {describe_error(error)}") from error
    if not isinstance(task, Task):
        raise ValueError(f"checkpoint={path} holds the configuration of a {type(task).__name__} instead of a task")
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint={path} does not fit a task with {told}: {error}") from error
    return task.eval(), config


def relocate_paths(config: Any, root: str, new: str) -> Any:
    """Copy a resolved configuration, with every path in the folder `root` moved to the folder `new`."""
    if isinstance(config, list):
        return [relocate_paths(value, root, new) for value in config]
    if isinstance(config, dict):
        return {key: relocate_paths(value, root, new) for key, value in config.items()}
    inside = isinstance(config, str) and f"{config}/".startswith(f"{root.rstrip('/')}/")
    return f"{new.rstrip('/')}{config[len(root.rstrip('/')) :]}" if inside else config


def configure_data(run: DictConfig, options: DictConfig) -> DictConfig:
    """Return the configuration of a run's data with other options; the option `root` is the present folder of its files.

    Raises:
        ValueError: `root` is given, and the data of the run is not read from a folder.
    """
    if "root" in options:
        if run.data.get("root") is None:
            raise ValueError(
                f"data.root={options.root}: the data of the run is not read from a folder, {run.data.val._target_} generates it"
            )
        run.data = relocate_paths(OmegaConf.to_container(run.data, resolve=True), run.data.root, options.root)
    return cast(DictConfig, OmegaConf.merge(run.data, options))
