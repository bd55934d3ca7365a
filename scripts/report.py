"""carafepp-report: tables from finished runs, the paper's figures beside ours."""

import importlib.util
import sys
from pathlib import Path

from omegaconf import DictConfig
from torchvision.io import ImageReadMode, decode_image
from torchvision.utils import save_image

from ..tasks.pictures import GRID_SIDE, caption, enlarge, grid
from .app import app
from .reporting.formats import comma_separated, printed, time_taken, written
from .reporting.plots import plots
from .reporting.runs import gather, read_runs
from .reporting.tables import Table, other_table, paper_tables, published

FILES = {"report.md": "markdown", "report.tex": "latex", "report.csv": "csv"}


def formatted(tables: list[Table], name: str) -> str:
    """All tables in one of the formats."""
    if name == "csv":
        return comma_separated(tables)
    # that of an ordinary sweep stands alone and needs no title
    alone = len(tables) == 1 and tables[0].name == "others"
    text = written([("" if alone else table.title, printed(table)) for table in tables], name)
    return f"{text}\n{'% ' * (name == 'latex')}{time_taken(tables)}\n"


def compare_pictures(table: Table) -> list[list]:
    """Rows of image, mask of inpainting, truth and the prediction of one run of each line, for the validation samples that all pictured."""
    lines = {id(line.setting): line for line in table.lines if line.setting}.values()
    folders = [next(iter(line.setting.runs.values())).folder / "pictures" for line in lines]
    labels = ["image", "truth", *(line.labels.get("row") or line.setting.label for line in lines)]
    rows = []
    for index in range(100):
        mask = folders[0] / f"{index}_mask.png"
        paths = [folders[0] / f"{index}_image.png", *[mask] * mask.exists(), folders[0] / f"{index}_truth.png"]
        paths += [folder / f"{index}_prediction.png" for folder in folders]
        if not all(path.exists() for path in paths):
            break
        pictures = [decode_image(str(path), ImageReadMode.RGB).float() / 255 for path in paths]
        # wide enough to write below
        pictures = [enlarge(picture, -(-GRID_SIDE // picture.shape[2])) for picture in pictures]
        names = [labels[0], *["hole"] * mask.exists(), *labels[1:]]
        rows.append([caption(picture, name) for picture, name in zip(pictures, names, strict=True)])
    return rows


def check(cfg: DictConfig, tables: list[Table]) -> None:
    """Refuse columns and rows that do not exist.

    Raises:
        ValueError: names the key and what there is.
    """
    columns = {column: None for task in published()[1].values() for column in task}
    if unknown := [column for column in cfg.metrics if column not in columns]:
        raise ValueError(f"metrics must be among {', '.join(columns)}, got {', '.join(unknown)}")
    lines = [line for table in tables for line in table.lines]
    rows = {line.labels.get("row") or line.setting.label: None for line in lines}
    if cfg.baseline and cfg.baseline not in rows:
        raise ValueError(f"baseline must be a row, one of {'; '.join(rows)}, got {cfg.baseline}")


@app("report")
def runs_report(cfg: DictConfig) -> None:
    """Print the tables, write them below the first of `runs`, and the runs' pictures side by side."""
    folders = [Path(folder) for folder in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    runs, problems = read_runs(folders)
    settings, repeated = gather(runs, published()[0])
    # what is printed in another format goes into a file
    notes = sys.stdout if cfg.format == "terminal" else sys.stderr
    print(*problems, *repeated, sep="\n", end="\n" if problems or repeated else "", file=notes)
    if not settings:
        sys.exit(f"no finished run below {', '.join(map(str, folders))}")
    tables = paper_tables(settings, cfg.metrics, cfg.digits, cfg.baseline)
    if others := [setting for setting in settings if not setting.table]:
        tables.append(other_table(others, cfg.digits, cfg.baseline))
    check(cfg, tables)
    print(formatted(tables, cfg.format))
    if borrowed := [line for table in tables for line in table.lines if line.setting and line.setting.table not in ("", table.name)]:
        rows = dict.fromkeys(f"{line.labels['row']}: runs of {line.setting.table}/{line.setting.row}" for line in borrowed)
        print("one configuration in two tables:", *rows, sep="\n  ", file=notes)
    for file, name in FILES.items():
        (folders[0] / file).write_text(formatted(tables, name))
    print(f"tables: {folders[0] / 'report.md'}, report.tex, report.csv", file=notes)
    names: list[str] = []
    for table in tables:
        # one table may have several protocols
        names.append(table.name)
        stem = table.name if names.count(table.name) == 1 else f"{table.name}_{names.count(table.name)}"
        if importlib.util.find_spec("matplotlib"):
            for path in plots(table, folders[0], stem):
                print(f"plot: {path}", file=notes)
        if rows := compare_pictures(table):
            path = folders[0] / ("compare.png" if table.name == "others" else f"{stem}.png")
            save_image(grid(rows), path)
            print(f"pictures (image, truth, then a run of each line of {table.name}): {path}", file=notes)


def main() -> None:
    """Run carafepp-report, or carafepp-report paper."""
    if sys.argv[1:2] == ["paper"]:
        from .reporting.paper import main as paper

        del sys.argv[1]
        paper()
    else:
        runs_report()


if __name__ == "__main__":
    main()
