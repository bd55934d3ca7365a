"""Overrides of a run, sorted by what they affect."""

from collections.abc import Iterable

# keys that affect where and how a run computes, and not its result
INCIDENTAL = ["seed", "resume", "hydra", "logger", "log_every_n_steps", "checkpoint_every_n_steps", "data.root", "data.workers"]
INCIDENTAL += ["channels_last", "compile", "trust"]
INCIDENTAL += [
    f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "enable_progress_bar")
]


def is_under(key: str, names: Iterable[str]) -> bool:
    """Return whether the key of an override is one of the names or below one; the prefix ~ and the package after @ are ignored."""
    key = key.lstrip("~").split("@")[0]
    return any(key == name or key.startswith(f"{name}.") for name in names)
