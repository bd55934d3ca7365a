"""carafepp-eval: the scores of a checkpoint."""

import json
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..tasks.runs import write_atomically, write_csv
from .app import app, load_task, quiet


def cell(value: object) -> str:
    """A value of a printed table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def load_published(experiment: str, weights: str | Path, options: DictConfig) -> tuple[nn.Module, DictConfig]:
    """Build the task of an experiment around weights that others publish, in evaluation mode, and return it with the configuration.

    `options` are of "task" and "data".
    """
    run = compose("train", overrides=[f"experiment={experiment}"])
    OmegaConf.set_struct(run, False)
    run.model.weights = str(weights)
    run.merge_with(options)
    return instantiate(run.task).eval(), run


def moved(config: object, root: str, new: str) -> object:
    """A resolved configuration whose paths in the folder `root` are in `new`."""
    if isinstance(config, list):
        return [moved(value, root, new) for value in config]
    if isinstance(config, dict):
        return {key: moved(value, root, new) for key, value in config.items()}
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
        run.data = moved(OmegaConf.to_container(run.data, resolve=True), run.data.root, options.root)
    return OmegaConf.merge(run.data, options)


@app("eval")
def main(cfg: DictConfig) -> None:
    """Validate a checkpoint and write its scores to eval.json, those of single classes to per_class.csv where the task has them."""
    quiet()
    if cfg.published:
        task, run = load_published(cfg.published, cfg.checkpoint, OmegaConf.masked_copy(cfg, ["task", "data"]))
    else:
        task, run = load_task(cfg.checkpoint, cfg.task)
    folder = Path(HydraConfig.get().runtime.output_dir)
    # training data is not needed, and need not be there any more
    data = instantiate(data_of_run(run, cfg.data), train=None)
    trainer = instantiate(cfg.trainer, enable_checkpointing=False, default_root_dir=folder)
    scores = trainer.validate(task, data, verbose=False)[0]
    if not trainer.is_global_zero:
        return
    write_atomically(folder / "eval.json", json.dumps({"checkpoint": str(cfg.checkpoint), "metrics": scores}, indent=2) + "\n")
    if task.per_class:
        write_csv(folder / "per_class.csv", task.per_class)
        for row in task.per_class:
            print("".join(f"{cell(value):24s}" for value in row.values()).rstrip())
    for name, value in scores.items():
        print(f"{name:24s} {value:.4f}")
    print(f"written to {folder / 'eval.json'}")


if __name__ == "__main__":
    main()
