"""Randomness keyed by (seed, epoch, index): a sample does not depend on the worker that draws it, on the order, or on a resumption."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def split_key(key: int | tuple[int, int], length: int) -> tuple[int, int]:
    """Split the key of an item, `index` (of epoch 0) or `(epoch, index)`, into `(epoch, index)`.

    Raises:
        IndexError: the index is not in 0..length - 1.
        ValueError: the epoch is negative.
    """
    epoch, index = key if isinstance(key, tuple) else (0, key)
    if not 0 <= index < length:
        raise IndexError(f"index must be in 0..{length - 1}, got {index}")
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    return int(epoch), int(index)


@contextlib.contextmanager
def keyed_rng(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and random for one sample, and restore their state afterwards."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(4)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
