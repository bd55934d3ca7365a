"""The scores of a checkpoint, or of published weights, on validation data."""

import json
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ...tasks.runs import write_classes
from ...tasks.task import Task
from ...tasks.writing import write_atomically
from ..common.checkpoints import configure_data, load_task
from ..common.lightning_messages import silence_lightning


def format_value(value: object) -> str:
    """Format a value for the printed table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def load_published(experiment: str, weights: str | Path, options: DictConfig) -> tuple[Task, DictConfig]:
    """Build the task of an experiment with published weights, and return it, in evaluation mode, with its configuration.

    Args:
        experiment: name of the experiment whose network has these weights.
        weights: file of the weights.
        options: options of "task" and "data" that replace those of the experiment.
    """
    run = compose("train", overrides=[f"experiment={experiment}"])
    OmegaConf.set_struct(run, False)
    run.model.weights = str(weights)
    run.merge_with(options)
    return instantiate(run.task).eval(), run


def evaluate(cfg: DictConfig) -> None:
    """Validate a checkpoint; write its scores to eval.json, and those of each class, if any, to per_class.csv and per_class.png."""
    silence_lightning()
    if cfg.published:
        task, run = load_published(cfg.published, cfg.checkpoint, OmegaConf.masked_copy(cfg, ["task", "data"]))
    else:
        task, run = load_task(cfg.checkpoint, cfg.task, cfg.trust)
    folder = Path(HydraConfig.get().runtime.output_dir)
    # training data may no longer exist, and is not needed
    data = instantiate(configure_data(run, cfg.data), train=None)
    trainer = instantiate(cfg.trainer, enable_checkpointing=False, default_root_dir=folder)
    scores = trainer.validate(task, data, verbose=False)[0]
    if not trainer.is_global_zero:
        return
    write_atomically(folder / "eval.json", json.dumps({"checkpoint": str(cfg.checkpoint), "metrics": scores}, indent=2) + "\n")
    if task.per_class:
        write_classes(folder, task.per_class)
        for row in [task.per_class[0].keys(), *(row.values() for row in task.per_class)]:
            print("".join(f"{format_value(value):24s}" for value in row).rstrip())
    for name, value in scores.items():
        print(f"{name:24s} {value:.4f}")
    print(f"written to {folder / 'eval.json'}")
