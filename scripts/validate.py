"""carafepp-validate: the problems of annotations in COCO's format, by image, annotation and rule."""

from collections import Counter
from pathlib import Path
from typing import Unpack

from omegaconf import DictConfig

from ..tasks.coco_check import CONSEQUENCES, RULES, Violation, check_annotations, check_images, read_annotations
from ..tasks.images import ReadOptions
from .common.app import app


def find_files(cfg: DictConfig) -> list[tuple[Path, Path]]:
    """List the annotation files to check, each with the folder of its images.

    Raises:
        ValueError: the configuration has neither `data` nor the pair `annotations` and `images`, or it has both.
        FileNotFoundError: the folder `data` holds no annotations.
    """
    if (cfg.data is None) == (cfg.annotations is None) or (cfg.annotations is None) != (cfg.images is None):
        raise ValueError("give data=FOLDER in COCO's layout, or annotations=FILE and images=FOLDER")
    if cfg.annotations is not None:
        return [(Path(cfg.annotations), Path(cfg.images))]
    pairs = [(Path(cfg.data, "annotations", f"instances_{name}.json"), Path(cfg.data, name)) for name in ("train2017", "val2017")]
    found = [pair for pair in pairs if pair[0].exists()]
    if not found:
        raise FileNotFoundError(f"data={cfg.data} has neither {pairs[0][0]} nor {pairs[1][0]}")
    return found


def find_problems(
    annotations: Path, images: Path, decode: bool, *, allow_outside: bool = False, **reading: Unpack[ReadOptions]
) -> list[Violation]:
    """Find the problems of one annotation file and, with `decode`, of its image files."""
    content = read_annotations(annotations)
    problems = check_annotations(content, images, allow_outside=allow_outside)
    if decode:
        problems += check_images(content, images, allow_outside=allow_outside, **reading)
    print(f"{annotations}: {len(content['images'])} images, {len(content['annotations'])} annotations, {len(problems)} problems")
    return problems


@app("validate")
def main(cfg: DictConfig) -> None:
    """Print every problem, and the number of problems by rule; exit with status 1 if there is one."""
    problems = []
    options = {name: cfg[name] for name in ("allow_outside", "ignore_orientation", "allow_huge")}
    for annotations, images in find_files(cfg):
        found = find_problems(annotations, images, cfg.decode, **options)
        print(*found, sep="\n", end="\n" if found else "")
        problems += found
    for rule, count in Counter(problem.rule for problem in problems).items():
        print(f"{count:8d} x {rule}: {CONSEQUENCES[RULES[rule]]}")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
