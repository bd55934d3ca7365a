"""Predictions of trained networks for given photographs, side by side, or their reassembly regions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from ...tasks.images import is_image, read_image
from ...tasks.lettering import LONGEST
from ...tasks.prediction_files import PredictionFiles
from ...tasks.region_pictures import draw_regions, explain_regions
from ...tasks.sheets import arrange
from ...tasks.task import Task
from ..common.checkpoints import load_task
from ..common.overrides import INCIDENTAL, is_under

# Largest number of images in figure.png.
FIGURE_ROWS = 6


def find_images(path: Path) -> list[Path]:
    """List the image files of a folder, or the single file.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"images={path} does not exist; give a folder of JPEG or PNG files, or one such file")
    found = sorted(p for p in path.iterdir() if is_image(p))
    if not found:
        raise FileNotFoundError(f"images={path} holds no image file; give a folder of JPEG or PNG files, or one such file")
    return found


def find_masks(path: Path, images: list[Path]) -> list[Path]:
    """List a mask for every image: the same file for all, or the file in the folder with the name of the image and any suffix.

    Raises:
        FileNotFoundError: the path does not exist, or an image has no mask.
        ValueError: an image has two masks.
    """
    if path.is_file():
        return [path] * len(images)
    if not path.is_dir():
        raise FileNotFoundError(f"masks={path} does not exist; give a mask image (white is the hole), or a folder with one for each image")
    named: dict[str, Path] = {}
    for mask in sorted(path.iterdir()):
        if is_image(mask) and (other := named.setdefault(mask.stem, mask)) != mask:
            raise ValueError(f"masks={path} has two masks for the same images, {other.name} and {mask.name}: delete one")
    if missing := [image for image in images if image.stem not in named]:
        raise FileNotFoundError(f"masks={path} has no mask for {len(missing)} of {len(images)} images: {missing[0].stem}.png is missing")
    return [named[image.stem] for image in images]


def name_networks(overrides: list[list[str]], paths: list[str]) -> list[str]:
    """Name each network by the overrides of its run that the other networks do not share, or else by its run folder.

    Runs that differ only in their seed, and checkpoints of one run, are also named by their paths.
    """
    omitted = [*INCIDENTAL, "scale", "experiment"]
    own = [[o for o in given if not is_under(o.partition("=")[0], omitted)] for given in overrides]
    shared = set.intersection(*map(set, own)) if len(own) > 1 else set()
    names: list[str] = []
    for given, path in zip(own, paths, strict=True):
        # a row of a table is named without the table
        parts = [o.rpartition("/")[2] if o.startswith("row=") else o for o in given if o not in shared]
        name = ", ".join(parts) or Path(path).parent.name
        names.append(f"{name}, {path}" if name in names else name)
    return names


def load_tasks(cfg: DictConfig) -> dict[str, Task]:
    """Load the tasks of one or several checkpoints by their names in pictures.

    Raises:
        ValueError: a checkpoint is given twice, a task takes masks and none are given, masks are given and a task takes none, or there are
            not as many titles as checkpoints.
    """
    paths = list_checkpoints(cfg)
    tasks, overrides = [], []
    for path in paths:
        task, config = load_task(path, cfg.task, cfg.trust)
        if task.takes_mask and cfg.masks is None:
            raise ValueError(f"checkpoint={path} takes a mask for every image: give masks=")
        if not task.takes_mask and cfg.masks is not None:
            raise ValueError(f"masks= is for checkpoints that take masks, and checkpoint={path} takes none")
        tasks.append(task.to(cfg.device))
        overrides.append(list(config.run.overrides))
    names = name_networks(overrides, paths) if cfg.titles is None else [str(title) for title in cfg.titles]
    if len(set(names)) != len(paths):
        raise ValueError(f"titles must be {len(paths)} different names, one for each checkpoint, got {names}")
    return dict(zip(names, tasks, strict=True))


def list_checkpoints(cfg: DictConfig) -> list[str]:
    """List the paths of the checkpoints, of which there may be one or several.

    Raises:
        ValueError: a path is given twice.
    """
    paths = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    if twice := [path for path in {*paths} if paths.count(path) > 1]:
        raise ValueError(f"checkpoint= must name each file once, got {twice[0]} {paths.count(twice[0])} times")
    return paths


def name_folders(checkpoints: Sequence[str]) -> list[str]:
    """Name a folder for each checkpoint: its run folder, preceded by those above it and followed by the file as far as names coincide.

    runs/a/best.ckpt and runs/b/best.ckpt have the folders a and b, runs/a/1/best.ckpt and runs/b/1/best.ckpt the folders a_1 and b_1, and
    the checkpoints best.ckpt and last.ckpt of runs/a the folders a_best and a_last.
    """
    paths = [Path(path).absolute() for path in checkpoints]
    for depth in range(1, max(len(path.parts) for path in paths)):
        for file in (False, True):
            names = ["_".join([*path.parts[1:-1][-depth:], *([path.stem] if file else [])]) for path in paths]
            if len({*names}) == len(names):
                return names
    return [str(number) for number in range(1, 1 + len(paths))]


def make_files(tasks: dict[str, Task], folder: Path, names: Sequence[str]) -> dict[str, PredictionFiles]:
    """Return what writes the predictions of each network for other programs; those of several are in folders of these names."""
    found = {}
    for name, (label, task) in zip(names, tasks.items(), strict=True):
        place = folder if len(tasks) == 1 else folder / name
        if (files := task.prediction_files(place)) is not None:
            place.mkdir(exist_ok=True)
            found[label] = files
    return found


def draw(tasks: dict[str, Task], inputs: dict[str, tuple], predictions: dict[str, Any]) -> list[Tensor]:
    """Draw the inputs (see `Task.read`), and then the prediction of each network for them.

    A photograph with a hole is also drawn without it. `predictions` are those that are known already.
    """
    label, task = next(iter(tasks.items()))
    known = {label: {"prediction": predictions[label]} if label in predictions else {} for label in tasks}
    shown = [inputs[label][0]] if task.takes_mask else []
    return [*shown, task.show(*inputs[label]), *(task.draw(*inputs[label], **known[label]) for label, task in tasks.items())]


@torch.no_grad()
def predict(cfg: DictConfig) -> None:
    """Draw the prediction or the reassembly regions of every image; report and skip images that cannot be read.

    Raises:
        FileNotFoundError, ValueError: an option is wrong, or no image can be read.
    """
    if cfg.max_side < 1:
        raise ValueError(f"max_side must be at least 1 pixel, got {cfg.max_side}")
    caption = "" if cfg.caption is None else str(cfg.caption)
    if len(caption) > LONGEST:
        raise ValueError(f"caption must have at most {LONGEST} characters, got {len(caption)}: {caption}")
    tasks = load_tasks(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    paths = find_images(Path(cfg.images))
    masks = [None] * len(paths) if cfg.masks is None else find_masks(Path(cfg.masks), paths)
    reading = {"ignore_orientation": cfg.ignore_orientation, "allow_huge": cfg.allow_huge}
    options = dict(reading)
    if cfg.masks is not None:
        options |= {"invert": cfg.invert_masks, "threshold": cfg.mask_threshold}
    files = {} if cfg.regions is not None else make_files(tasks, folder, name_folders(list_checkpoints(cfg)))
    skipped, rows = [], []
    columns = [*(["image"] if masks[0] is None else ["photograph", "hole"]), *(tasks if len(tasks) > 1 else ["prediction"])]
    for path, mask in tqdm(list(zip(paths, masks, strict=True)), unit="image"):
        try:
            inputs = {label: task.read(path, mask, cfg.max_side, **options) for label, task in tasks.items()}
        except (OSError, ValueError) as error:
            skipped.append(f"skipped: {error}")
            continue
        predictions = {label: tasks[label].predict(*inputs[label]) for label in files}
        height, width = next(iter(inputs.values()))[0].shape[1:]
        # the size of the file, where the image may have been shrunk
        if max(height, width) == cfg.max_side:
            width, height = read_image(path, **reading).size
        for label, prediction in predictions.items():
            files[label].add(path.name, (height, width), prediction)
        if cfg.regions is not None:
            figures = [draw_regions(task.view(*inputs[label]), cfg.regions, cfg.locations) for label, task in tasks.items()]
            figure = explain_regions(figures, list(tasks) if len(tasks) > 1 else [], caption)
        else:
            row = draw(tasks, inputs, predictions)
            figure = row[-1] if len(tasks) == 1 and not caption else arrange([row], columns=columns, note=caption)
            if len(rows) < FIGURE_ROWS:
                rows.append(row)
        save_image(figure, folder / f"{path.name}.png")
    if len(rows) > 1:
        save_image(arrange(rows, columns=columns, note=caption), folder / "figure.png")
    summary = "\n".join([*skipped, f"{len(paths) - len(skipped)} of {len(paths)} images predicted, pictures in {folder}"])
    if len(skipped) == len(paths):
        raise ValueError(summary)
    print("\n".join([summary, *[f"predictions for other programs: {each.finish()}" for each in files.values()]]))
