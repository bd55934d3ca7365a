"""carafepp-report: tables from finished runs. It reads result.json files only."""

import json
import statistics
from pathlib import Path

from omegaconf import DictConfig
from torchvision.io import ImageReadMode, decode_image
from torchvision.utils import save_image

from ..tasks.pictures import grid
from .app import app


def read_results(folder: Path) -> tuple[list[dict], list[str]]:
    """Read the finished runs below a folder, each with its "folder", and name those that are broken or unfinished.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"runs={folder} is not a folder")
    results, problems = [], []
    for config in sorted(folder.rglob("config.yaml")):
        path = config.with_name("result.json")
        if not path.exists():
            problems.append(f"{config.parent}: unfinished, continue it with carafepp-train resume={config.parent}")
            continue
        try:
            result = json.loads(path.read_text())
            results.append({**result, "folder": config.parent, "metrics": dict(result["metrics"]), "choices": dict(result["choices"])})
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: broken ({type(error).__name__}: {error})")
    return results, problems


def settings(result: dict) -> dict[str, str]:
    """What a run was told: its overrides, without the seed, that several runs of one setting differ in."""
    pairs = (override.lstrip("+~").split("=", 1) for override in result["overrides"] if "=" in override)
    return {key: value for key, value in pairs if key != "seed" and not key.startswith("hydra.")}


def summarize(results: list[dict], digits: int) -> list[dict[str, str]]:
    """One row a setting: what distinguishes it, metrics as mean and standard deviation over its runs, size and time."""
    options = [settings(result) for result in results]
    told = dict.fromkeys(key for option in options for key in option)
    varying = [key for key in told if len({option.get(key, "") for option in options}) > 1]
    groups: dict[tuple, list[dict]] = {}
    for result, option in zip(results, options, strict=True):
        groups.setdefault(tuple(option.get(key, "") for key in varying), []).append(result)
    rows = []
    for values, runs in groups.items():
        row = dict(zip(varying, values, strict=True)) | {"runs": str(len(runs))}
        for name in dict.fromkeys(name for run in runs for name in run["metrics"]):
            scores = [run["metrics"][name] for run in runs if name in run["metrics"]]
            deviation = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
            row[name.removeprefix("val/")] = f"{statistics.mean(scores):.{digits}f}{deviation}"
        row["parameters"] = f"{runs[0]['parameters']:,}"
        row["GFLOPs"] = f"{runs[0]['flops'] / 1e9:.3f}"
        row["seconds"] = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Align rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    widths = [max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns]
    lines = [[name.ljust(width) for name, width in zip(columns, widths, strict=True)], ["-" * width for width in widths]]
    lines += [[row.get(name, "").ljust(width) for name, width in zip(columns, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare_pictures(results: list[dict]) -> list[list]:
    """Rows of image, truth and each run's prediction, for the validation samples that all runs pictured."""
    folders = [result["folder"] / "pictures" for result in results]
    rows = []
    for index in range(100):
        paths = [folders[0] / f"{index}_image.png", folders[0] / f"{index}_truth.png"]
        paths += [folder / f"{index}_prediction.png" for folder in folders]
        if not all(path.exists() for path in paths):
            break
        rows.append([decode_image(str(path), ImageReadMode.RGB).float() / 255 for path in paths])
    return rows


@app("report")
def main(cfg: DictConfig) -> None:
    """Print the table, write it to report.md below `runs`, and the runs' pictures side by side to compare.png."""
    folder = Path(cfg.runs)
    results, problems = read_results(folder)
    for problem in problems:
        print(problem)
    if not results:
        print(f"no finished run below {folder}")
        return
    table = markdown(summarize(results, cfg.digits))
    print(table)
    (folder / "report.md").write_text(table + "\n")
    print(f"\ntable: {folder / 'report.md'}")
    if rows := compare_pictures(results):
        save_image(grid(rows), folder / "compare.png")
        print(f"pictures (image, truth, then the runs in the table's order): {folder / 'compare.png'}")


if __name__ == "__main__":
    main()
