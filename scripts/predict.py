"""carafepp-predict: a trained network on one's own photographs."""

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from ..tasks.images import is_image, read_image
from ..tasks.inpainting import Inpainting
from ..tasks.masks import read_mask
from .app import app, load_task


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


def fill(task: Inpainting, path: Path, mask_path: Path, max_side: int) -> Tensor:
    """Complete a photograph at its own size -> [3, H, W] in [0, 1].

    Raises:
        ValueError: photograph and mask differ in size.
    """
    image, mask = pil_to_tensor(read_image(path)).float() / 255, torch.from_numpy(read_mask(mask_path))
    if mask.shape != image.shape[1:]:
        (height, width), (mask_height, mask_width) = image.shape[1:], mask.shape
        raise ValueError(f"mask {mask_path} must have the size of {path}, {width} x {height} pixels, got {mask_width} x {mask_height}")
    return task.fill(image, mask[None].float(), max_side)


@app("predict")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Draw the prediction over every image, or fill its hole; report and skip those that cannot be read."""
    task, _ = load_task(cfg.checkpoint, cfg.task)
    task.to(cfg.device)
    folder = Path(HydraConfig.get().runtime.output_dir)
    paths = find_images(Path(cfg.images))
    inpaints = isinstance(task, Inpainting)
    if inpaints != (cfg.masks is not None):
        raise ValueError("this checkpoint fills holes: give masks=" if inpaints else "masks= is for checkpoints of inpainting alone")
    masks = find_masks(Path(cfg.masks), paths) if inpaints else [None] * len(paths)
    skipped = []
    for path, mask in tqdm(list(zip(paths, masks, strict=True)), unit="image"):
        try:
            picture = fill(task, path, mask, cfg.max_side) if inpaints else task.draw(read_pixels(path, cfg.max_side))
        except (OSError, ValueError) as error:
            skipped.append(f"skipped: {error}")
            continue
        save_image(picture, folder / f"{path.name}.png")
    summary = "\n".join([*skipped, f"{len(paths) - len(skipped)} of {len(paths)} images predicted, pictures in {folder}"])
    if len(skipped) == len(paths):
        raise ValueError(summary)
    print(summary)


if __name__ == "__main__":
    main()
