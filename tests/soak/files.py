"""Damaged files of every kind that carafepp reads: images, annotations, shards, run folders, weights and tables of tiles."""

from soak import workers


def run(minutes: float, seed: int) -> dict[str, int]:
    """Read damaged files (see readers.py), and return the numbers of files by their kind and by what came of them."""
    found = workers.run_cases("files", "readers", minutes=minutes, seed=seed)
    return dict(sorted(found.items()))
