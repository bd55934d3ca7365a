"""The classifier that a backbone starts from, in a folder of finished runs and files (paper, sections 4.1 and 5.2)."""

import json
from collections.abc import Iterator
from pathlib import Path

# of a state dict and of a checkpoint
SUFFIXES = (".pth", ".pt", ".ckpt")


def list_candidates(root: Path, row: str) -> Iterator[tuple[Path, int | None]]:
    """Yield the checkpoints of the finished runs of a row below a folder with their seeds, and the files that have the name of the row.

    The files of `table2/resnet50` are resnet50.pth, .pt or .ckpt, and with torchvision's suffix, resnet50-0676ba61.pth.
    """
    name = row.rpartition("/")[2]
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.name == "result.json":
            try:
                result = json.loads(path.read_text())
                found, seed = result["choices"]["row"], result.get("seed")
            except (ValueError, KeyError, TypeError):
                continue
            if found == row:
                yield path.with_name("best.ckpt"), seed
        elif path.suffix in SUFFIXES and path.stem.partition("-")[0] == name:
            yield path, None


def find_classifier(root: str | Path | None, row: str | None, seed: int | None = None) -> Path | None:
    """Find the weights of the classifier that a network starts from.

    Among several classifiers of the row, it is the one with the seed of the network, so that runs of different seeds are independent.

    Args:
        root: a folder of finished runs of `carafepp-train`, of files, or of both, at any depth; None starts from random weights.
        row: the row of the classifier, such as "table2/resnet50_carafe"; None for a network that starts from none.
        seed: the seed of the network, which selects among runs of the row; None selects none.

    Returns:
        The best.ckpt of a run, or a file; None without `root`.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither a finished run of the row nor a file of that name.
        ValueError: there are several, none or more than one of them with `seed`, or `root` is given without `row`.
    """
    if root is None:
        return None
    if row is None:
        raise ValueError(f"weights_root={root} needs pretraining=ROW, the classifier to start from, such as table2/resnet50_carafe")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"weights_root={root} is not a folder; give one that holds finished classifiers")
    found = list(list_candidates(Path(root), row))
    if not found:
        experiment, _, name = row.rpartition("/")
        raise FileNotFoundError(
            f"weights_root={root} holds no finished run of {row} and no file {name}.pth; train it with: "
            f"carafepp-train experiment={experiment} row={row} data.root=IMAGENET hydra.run.dir={root}/{name} (or scale=small)"
        )
    # a single classifier serves every seed
    chosen = [path for path, own in found if len(found) == 1 or (own is not None and own == seed)]
    if len(chosen) != 1:
        raise ValueError(
            f"weights_root={root} holds {len(found)} classifiers {row}, of which {len(chosen)} have seed={seed}: "
            f"{', '.join(str(path) for path, _ in found)}; give a folder with one of them, or backbone.weights=FILE"
        )
    return chosen[0]
