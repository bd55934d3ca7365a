"""Overrides of a run that say where and how it computes, not what."""

from collections.abc import Iterable

INCIDENTAL = ["seed", "resume", "hydra", "logger", "log_every_n_steps", "checkpoint_every_n_steps", "data.root", "data.workers"]
INCIDENTAL += ["channels_last", "compile"]
INCIDENTAL += [
    f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "enable_progress_bar")
]


def is_under(key: str, names: Iterable[str]) -> bool:
    """Whether an override's key is one of the names or below it; `data.root`, `+data.root` and `~data.root` are the same."""
    key = key.lstrip("~").split("@")[0]
    return any(key == name or key.startswith(f"{name}.") for name in names)
