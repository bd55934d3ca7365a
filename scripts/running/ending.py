"""What a training and a sweep print at their end: scores, files, and the next commands."""

from collections.abc import Iterable
from pathlib import Path

from ...tasks.task import Task
from ..common.paper import read_paper
from ..common.results import FinishedRun
from ..common.run_folders import is_in_sweep, shorten_path
from ..reporting import group_runs, read_runs, render_tables, tabulate_kinds, tabulate_paper

SHOWN = ("AP", "AP50", "top1", "top5", "mIoU", "pixel_accuracy", "L1_percent", "psnr_db")


def describe_run(folder: Path, task: Task, trust: Iterable[str] = ()) -> str:
    """Describe a finished run: its scores, its best score, its files, and the commands to go on with.

    Args:
        folder: the run folder.
        task: the task of the run.
        trust: names of your own code in the configuration, which the next command must name, too.
    """
    run, name = FinishedRun.read(folder / "result.json"), task.monitor
    short = shorten_path(folder)
    scores = ", ".join(f"{metric.removeprefix('val/')} {value:.4f}" for metric, value in run.metrics.items())
    # the table at the end of a sweep says the rest
    if is_in_sweep(folder):
        return f"{short}: {scores}"
    lines = [f"scores:      {scores}"]
    if points := [point for point in run.curve if name in point]:
        pick = max if task.direction == "max" else min
        best = pick(points, key=lambda point: point[name])
        lines.append(f"best:        {name.removeprefix('val/')} {best[name]:.4f} at step {int(best['step'])}")
    lines.append(f"pictures:    {short / 'pictures.png'}")
    lines.append(f"checkpoints: {short / 'best.ckpt'}, last.ckpt")
    more = " masks=MASKS" if task.takes_mask else ""
    if names := ",".join(trust):
        more += f" trust={names}" if "," not in names else f" 'trust=[{names}]'"
    lines.append(f"next:        carafepp-predict checkpoint={short / 'best.ckpt'} images=PHOTOGRAPHS{more}")
    lines.append(f"             carafepp-report runs={short}")
    return "\n".join(lines)


def describe_sweep(folder: Path) -> str:
    """Tabulate the finished runs of a sweep, name the others, and say which command writes the table."""
    if not folder.is_dir():
        return ""
    runs, problems = read_runs([folder])
    settings, repeated = group_runs(runs, read_paper()[0])
    tables = tabulate_paper(settings, SHOWN, 4, None)
    tables += tabulate_kinds([setting for setting in settings if not setting.table], 4, None)
    parts = [*problems, *repeated]
    if tables:
        parts += [render_tables(tables, "terminal"), f"carafepp-report runs={shorten_path(folder)} writes the table, plots and pictures"]
    return "\n".join(parts)
