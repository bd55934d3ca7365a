"""Side-by-side pictures of the runs of a table."""

from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from ...tasks.pictures import GRID_SIDE, caption, enlarge
from .tables import Table


def compare_pictures(table: Table) -> list[list[Tensor]]:
    """List the pictures of each validation sample for which one run of every line has pictures.

    Returns:
        For each sample the image, the hole if there is one, the truth, and a prediction for each line; pictures are [3, H, W] in [0, 1].
    """
    lines = {id(line.setting): (line.name, line.setting) for line in table.lines if line.setting}.values()
    folders = [next(iter(setting.runs.values())).folder / "pictures" for _, setting in lines]
    labels = ["image", "truth", *(name for name, _ in lines)]
    rows = []
    for index in range(100):
        mask = folders[0] / f"{index}_mask.png"
        paths = [folders[0] / f"{index}_image.png", *[mask] * mask.exists(), folders[0] / f"{index}_truth.png"]
        paths += [folder / f"{index}_prediction.png" for folder in folders]
        if not all(path.exists() for path in paths):
            break
        pictures = [decode_image(str(path), ImageReadMode.RGB).float() / 255 for path in paths]
        # a caption needs at least this width
        pictures = [enlarge(picture, -(-GRID_SIDE // picture.shape[2])) for picture in pictures]
        names = [labels[0], *["hole"] * mask.exists(), *labels[1:]]
        rows.append([caption(picture, name) for picture, name in zip(pictures, names, strict=True)])
    return rows
