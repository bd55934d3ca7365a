"""Side-by-side pictures of the runs of a table."""

from pathlib import Path

from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from ...tasks.sheets import arrange
from .cells import format_scores
from .tables import Line, Table


def compare_pictures(table: Table) -> Tensor | None:
    """Arrange the pictures of the validation samples for which one run of every line has pictures; return None if there are none.

    Returns:
        A row for each sample, [3, height, width] in [0, 1]: the image, the hole if there is one, the truth, and the prediction of each
        line, under what distinguishes the line and its first score. A note below says what the columns are.
    """
    # a setting has a line for each of its tasks
    lines = list({id(line.setting): line for line in reversed(table.lines) if line.setting}.values())[::-1]
    folders = [next(iter(line.setting.runs.values())).folder / "pictures" for line in lines if line.setting]
    names = ["image", *["mask"] * (folders[0] / "0_mask.png").exists(), "truth"]
    rows = []
    for index in range(100):
        paths = [folders[0] / f"{index}_{name}.png" for name in names] + [folder / f"{index}_prediction.png" for folder in folders]
        if not all(path.exists() for path in paths):
            break
        rows.append([_read(path) for path in paths])
    titles = [name.replace("mask", "hole") for name in names] + [_title(line, table.digits) for line in lines]
    hole = ", its hole" if "mask" in names else ""
    note = (
        f"Left to right: a validation image{hole}, the truth, and the prediction of one run of each network, "
        "under the mean score of its runs on all validation images."
    )
    return arrange(rows, columns=titles, note=note) if rows else None


def _read(path: Path) -> Tensor:
    return decode_image(str(path), ImageReadMode.RGB).float() / 255


def _title(line: Line, digits: int) -> str:
    name, cell = next(iter(line.cells.items()), ("", None))
    return f"{line.title}\n{name} {format_scores(cell.scores, digits)}" if cell and cell.scores else line.title
