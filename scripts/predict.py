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


def read_pixels(path: Path, max_side: int) -> Tensor:
    """Read a photograph with its longer side at most `max_side` pixels -> [3, H, W] in [0, 1]."""
    image = read_image(path)
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return pil_to_tensor(image).float() / 255


@app("predict")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Draw the prediction over every image; report and skip those that cannot be read."""
    task, _ = load_task(cfg.checkpoint)
    task.to(cfg.device)
    folder = Path(HydraConfig.get().runtime.output_dir)
    skipped = []
    paths = find_images(Path(cfg.images))
    for path in tqdm(paths, unit="image"):
        try:
            image = read_pixels(path, cfg.max_side)
        except (OSError, ValueError) as error:
            skipped.append(f"skipped: {error}")
            continue
        save_image(task.draw(image), folder / f"{path.name}.png")
    print(*skipped, f"{len(paths) - len(skipped)} of {len(paths)} images predicted, pictures in {folder}", sep="\n")


if __name__ == "__main__":
    main()
