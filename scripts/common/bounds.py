"""Bounds of the numbers in the configuration of a training, which the libraries behind them refuse without naming the key."""

import math

from omegaconf import DictConfig, OmegaConf

# the least value by key; all are whole numbers
LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.val_batch_size": 1,
    "data.workers": 0,
    "log_every_n_steps": 1,
    "checkpoint_every_n_steps": 1,
    "trainer.accumulate_grad_batches": 1,
}
# these may be fractions
POSITIVE = ("data.epochs", "trainer.val_check_interval")
LARGEST_SEED = 2**32 - 1


def check_bounds(cfg: DictConfig) -> None:
    """Check the numbers of a resolved configuration; keys that it lacks, and null, are passed over.

    Raises:
        ValueError: a number is outside its bounds; the message names the key.
    """
    given = {key: OmegaConf.select(cfg, key) for key in (*LEAST, *POSITIVE)}
    for key, least in LEAST.items():
        value = given[key]
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value}")
    for key in POSITIVE:
        value = given[key]
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{key} must be a number above 0, got {value}")
    if given["seed"] is not None and given["seed"] > LARGEST_SEED:
        raise ValueError(f"seed must be at most {LARGEST_SEED}, got {given['seed']}")
    if (rounds := OmegaConf.select(cfg, "trainer.max_epochs")) not in (None, 1):
        raise ValueError(f"trainer.max_epochs must be 1, because data.epochs is the number of passes over the data, got {rounds}")
