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
from ...tasks.pictures import arrange, caption, enlarge
from ...tasks.prediction_files import PredictionFiles
from ...tasks.region_pictures import draw_regions
from ...tasks.task import Task
from ..common.checkpoints import load_task
from ..common.overrides import INCIDENTAL, is_under


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


def load_tasks(cfg: DictConfig) -> dict[str, Task]:
    """Load the tasks of one or several checkpoints, each labelled with the overrides of its run.

    Raises:
        ValueError: a checkpoint is given twice, a task takes masks and none are given, or masks are given and a task takes none.
    """
    tasks = {}
    for path in list_checkpoints(cfg):
        task, config = load_task(path, cfg.task, cfg.trust)
        omitted = [*INCIDENTAL, "scale", "experiment"]
        label = ", ".join(o for o in config.run.overrides if not is_under(o.partition("=")[0], omitted)) or Path(path).parent.name
        # runs that differ only in their seed have the same label, and so do checkpoints of the same run
        tasks[f"{label}, {path}" if label in tasks else label] = task.to(cfg.device)
        if task.takes_mask and cfg.masks is None:
            raise ValueError(f"checkpoint={path} takes a mask for every image: give masks=")
        if not task.takes_mask and cfg.masks is not None:
            raise ValueError(f"masks= is for checkpoints that take masks, and checkpoint={path} takes none")
    return tasks


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


def draw(tasks: dict[str, Task], inputs: dict[str, tuple], predictions: dict[str, Any], cfg: DictConfig) -> Tensor:
    """Draw the prediction or the regions of each network for its inputs (see `Task.read`), several networks side by side.

    `predictions` are those that are known already.
    """
    if cfg.regions is not None:
        pictures = {label: draw_regions(task.view(*inputs[label]), cfg.regions, cfg.locations) for label, task in tasks.items()}
    else:
        known = {label: {"prediction": predictions[label]} if label in predictions else {} for label in tasks}
        pictures = {label: task.draw(*inputs[label], **known[label]) for label, task in tasks.items()}
    if len(pictures) == 1:
        return next(iter(pictures.values()))
    titled = [caption(picture, label) for label, picture in pictures.items()]
    if cfg.regions is not None:
        return arrange([[figure] for figure in titled])
    label, task = next(iter(tasks.items()))
    first = task.show(*inputs[label])
    # pictures may be enlarged, or have a legend below
    factor = titled[0].shape[2] // first.shape[2]
    return arrange([[caption(enlarge(first, factor), "image"), *titled]])


@torch.no_grad()
def predict(cfg: DictConfig) -> None:
    """Draw the prediction or the reassembly regions of every image; report and skip images that cannot be read.

    Raises:
        FileNotFoundError, ValueError: an option is wrong, or no image can be read.
    """
    if cfg.max_side < 1:
        raise ValueError(f"max_side must be at least 1 pixel, got {cfg.max_side}")
    tasks = load_tasks(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    paths = find_images(Path(cfg.images))
    masks = [None] * len(paths) if cfg.masks is None else find_masks(Path(cfg.masks), paths)
    reading = {"ignore_orientation": cfg.ignore_orientation, "allow_huge": cfg.allow_huge}
    options = dict(reading)
    if cfg.masks is not None:
        options |= {"invert": cfg.invert_masks, "threshold": cfg.mask_threshold}
    files = {} if cfg.regions is not None else make_files(tasks, folder, name_folders(list_checkpoints(cfg)))
    skipped = []
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
        save_image(draw(tasks, inputs, predictions, cfg), folder / f"{path.name}.png")
    summary = "\n".join([*skipped, f"{len(paths) - len(skipped)} of {len(paths)} images predicted, pictures in {folder}"])
    if len(skipped) == len(paths):
        raise ValueError(summary)
    print("\n".join([summary, *[f"predictions for other programs: {each.finish()}" for each in files.values()]]))
