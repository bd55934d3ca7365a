"""Bounds of the numbers in the configurations of all commands, which the libraries behind them refuse without naming the key, or accept."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError


class Bound(NamedTuple):
    """The values that some keys may have, and the items of those in LISTS."""

    wording: str
    holds: Callable[[Any], bool]
    keys: Iterable[str]


def is_whole(value: object) -> bool:
    """Return whether a value is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and not true or false."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


LARGEST_SEED = 2**32 - 1
BOUNDS = (
    Bound(
        "a whole number of at least 1",
        lambda value: is_whole(value) and value >= 1,
        (
            # trainings
            "data.batch_size",
            "data.val_batch_size",
            "log_every_n_steps",
            "checkpoint_every_n_steps",
            "trainer.accumulate_grad_batches",
            # networks; what others refer to comes first, so that a message names it
            "decoder.dim",
            "decoder.ppm_dim",
            "decoder.mask_size",
            "model.fpn_dim",
            "model.mask_dim",
            "model.head_dim",
            "model.width",
            "task.discriminator.width",
            "model.min_size",
            "model.max_size",
            "model.rpn_pre_nms_top_n_train",
            "model.rpn_pre_nms_top_n_test",
            "model.rpn_post_nms_top_n_train",
            "model.rpn_post_nms_top_n_test",
            "model.box_batch_size_per_image",
            "model.box_detections_per_img",
            # other commands
            "batch",
            "step_batch",
            "threads",
            "op.shape",
            "limit",
            "patience",
            "jobs",
            "size",
            "train",
            "val",
        ),
    ),
    Bound(
        "a whole number of at least 0",
        lambda value: is_whole(value) and value >= 0,
        ("seed", "data.workers", "trainer.num_sanity_val_steps", "model.trainable_layers", "mask_convs", "rounds", "show", "digits"),
    ),
    Bound(
        f"at most {LARGEST_SEED}",
        lambda value: value <= LARGEST_SEED,
        ("seed",),
    ),
    Bound(
        "a number above 0",
        lambda value: is_number(value) and value > 0,
        ("data.epochs", "trainer.val_check_interval", "task.sides", "model.anchor_sizes"),
    ),
    Bound(
        "a number of at least 0",
        lambda value: is_number(value) and value >= 0,
        (
            "optimizer.lr",
            "optimizer.weight_decay",
            "optimizer.eps",
            "schedule.power",
            "task.schedule.power",
            "task.auxiliary_weight",
            "task.hole_weight",
            "task.valid_weight",
            "task.adversarial_weight",
            "model.allowed_border",
            "seconds",
            "max_unfold_gb",
        ),
    ),
    Bound(
        "a number of at least 0 and below 1",
        lambda value: is_number(value) and 0 <= value < 1,
        ("optimizer.betas", "optimizer.momentum"),
    ),
    Bound(
        "a number above 0 and at most 1",
        lambda value: is_number(value) and 0 < value <= 1,
        ("model.box_positive_fraction",),
    ),
)
# these may be null
NULLABLE = ("threads", "batch", "size", "model.allowed_border")
# the length of lists whose items a library takes by position
LENGTHS = {"optimizer.betas": 2, "task.sides": 2, "model.anchor_sizes": 5}
# whose values are lists, or mappings, of such numbers, or may be
LISTS = (*LENGTHS, "op.shape", "size", "batch", "seconds")


ABSENT = object()


def select(cfg: DictConfig, key: str) -> Any:
    """Return the value of a key, or ABSENT if the configuration lacks it or it cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key, default=ABSENT)
    # whoever needs the value reports this
    except InterpolationResolutionError:
        return ABSENT


def check_bounds(cfg: DictConfig) -> None:
    """Check the numbers of a configuration; keys that it lacks, or that cannot be resolved, are passed over.

    Raises:
        ValueError: a number is outside its bounds; the message names the key.
    """
    for wording, holds, keys in BOUNDS:
        for key in keys:
            value = select(cfg, key)
            if value is ABSENT or (value is None and key in NULLABLE):
                continue
            several = [*value.values()] if isinstance(value, DictConfig) else [*value] if isinstance(value, ListConfig) else [value]
            items = several if key in LISTS else [value]
            if not items or not all(map(holds, items)):
                raise ValueError(f"{key} must be {wording}, got {value}")
    for key, length in LENGTHS.items():
        value = select(cfg, key)
        if value is not ABSENT and (not isinstance(value, ListConfig) or len(value) != length):
            raise ValueError(f"{key} must be a list of {length} numbers, got {value}")
    if (rounds := select(cfg, "trainer.max_epochs")) not in (ABSENT, 1):
        raise ValueError(f"trainer.max_epochs must be 1, because data.epochs is the number of passes over the data, got {rounds}")
