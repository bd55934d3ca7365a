"""carafepp-predict: trained networks on one's own photographs, side by side, and where their features come from."""

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from ..tasks.images import is_image, read_image
from ..tasks.inpainting import Inpainting
from ..tasks.masks import read_mask
from ..tasks.pictures import caption, enlarge, grid
from ..tasks.regions import draw_regions
from .app import app, load_task
from .reporting.runs import INCIDENTAL, under


def find_images(path: Path) -> list[Path]:
    """List the image files of a folder, or the one file.

    Raises:
        FileNotFoundError: there is no such path, or no image in the folder.
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
    """List a mask for every image: of a folder the file with the image's name, whatever its suffix, or the one file for all.

    Raises:
        FileNotFoundError: there is no such path, or an image has no mask.
    """
    if path.is_file():
        return [path] * len(images)
    if not path.is_dir():
        raise FileNotFoundError(f"masks={path} does not exist; give a mask image (white is the hole), or a folder with one for each image")
    named = {mask.stem: mask for mask in sorted(path.iterdir()) if is_image(mask)}
    if missing := [image for image in images if image.stem not in named]:
        raise FileNotFoundError(f"masks={path} has no mask for {len(missing)} of {len(images)} images: {missing[0].stem}.png is missing")
    return [named[image.stem] for image in images]


def read_pixels(path: Path, max_side: int) -> Tensor:
    """Read a photograph with its longer side at most `max_side` pixels -> [3, H, W] in [0, 1]."""
    image = read_image(path)
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return pil_to_tensor(image).float() / 255


def read_with_hole(path: Path, mask_path: Path) -> tuple[Tensor, Tensor]:
    """Read a photograph at its own size and its mask -> [3, H, W] in [0, 1], [1, H, W], 1 in the hole.

    Raises:
        ValueError: photograph and mask differ in size.
    """
    image, mask = pil_to_tensor(read_image(path)).float() / 255, torch.from_numpy(read_mask(mask_path))
    if mask.shape != image.shape[1:]:
        (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
        raise ValueError(f"mask {mask_path} must have the size of {path}, {width} x {height} pixels, got {mask_width} x {mask_height}")
    return image, mask[None].float()


def load_tasks(cfg: DictConfig) -> dict[str, LightningModule]:
    """The tasks of one or several checkpoints, by what their runs were told.

    Raises:
        ValueError: some fill holes and some do not, or masks are given to those that do not, or none to those that do.
    """
    tasks = {}
    for path in [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else cfg.checkpoint:
        task, config = load_task(path, cfg.task)
        told = [
            override for override in config.run.overrides if not under(override.partition("=")[0], [*INCIDENTAL, "scale", "experiment"])
        ]
        label = ", ".join(told) or Path(path).parent.name
        # runs that differ in their seed, or checkpoints of one run
        tasks[f"{label}, {path}" if label in tasks else label] = task.to(cfg.device)
        if isinstance(task, Inpainting) and cfg.masks is None:
            raise ValueError(f"{path} fills holes: give masks=")
        if not isinstance(task, Inpainting) and cfg.masks is not None:
            raise ValueError(f"masks= is for checkpoints of inpainting alone, got {path}")
    return tasks


def draw(tasks: dict[str, LightningModule], image: Tensor, mask: Tensor | None, cfg: DictConfig) -> Tensor:
    """What the networks make of an image [3, H, W] and its hole [1, H, W]; if there are several, all in one picture."""
    seen = (image,) if mask is None else (image, mask, cfg.max_side)
    if cfg.regions is not None:
        pictures = {label: draw_regions(task.view(*seen), cfg.regions, cfg.locations) for label, task in tasks.items()}
    else:
        pictures = {label: task.draw(*seen) if mask is None else task.fill(*seen) for label, task in tasks.items()}
    if len(pictures) == 1:
        return next(iter(pictures.values()))
    titled = [caption(picture, label) for label, picture in pictures.items()]
    if cfg.regions is not None:
        return grid([[figure] for figure in titled])
    first = image if mask is None else torch.where(mask > 0, 1, image)
    # pictures may be enlarged, or have a legend below
    factor = titled[0].shape[2] // first.shape[2]
    return grid([[caption(enlarge(first, factor), "image"), *titled]])


@app("predict")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Draw the prediction over every image, or fill its hole, or draw reassembly regions; report and skip what cannot be read."""
    if cfg.max_side < 1:
        raise ValueError(f"max_side must be 1 pixel at least, got {cfg.max_side}")
    tasks = load_tasks(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    paths = find_images(Path(cfg.images))
    masks = [None] * len(paths) if cfg.masks is None else find_masks(Path(cfg.masks), paths)
    skipped = []
    for path, mask in tqdm(list(zip(paths, masks, strict=True)), unit="image"):
        try:
            image, hole = (read_pixels(path, cfg.max_side), None) if mask is None else read_with_hole(path, mask)
        except (OSError, ValueError) as error:
            skipped.append(f"skipped: {error}")
            continue
        save_image(draw(tasks, image, hole, cfg), folder / f"{path.name}.png")
    summary = "\n".join([*skipped, f"{len(paths) - len(skipped)} of {len(paths)} images predicted, pictures in {folder}"])
    if len(skipped) == len(paths):
        raise ValueError(summary)
    print(summary)


if __name__ == "__main__":
    main()
