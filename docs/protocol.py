"""The tables of docs/protocol.md: where the noise of the small runs comes from, what the study resolves, and what its plan costs."""

import json
import math
import statistics
from pathlib import Path

from carafepp.scripts.common.paper import list_equal_rows, list_rows, read_paper, read_pretraining
from carafepp.scripts.common.plan import SCALE, find_table, plan_sweeps
from carafepp.scripts.common.results import is_finished
from carafepp.scripts.reporting.cells import format_difference, format_scores
from carafepp.scripts.reporting.statistics import Difference, summarize, t_quantile
from comparisons import RESULTS, Comparison, find_setting
from omegaconf import OmegaConf

OPTIONS = OmegaConf.load(Path(__file__).parents[1] / "conf" / "train_paper.yaml")

# main comparisons, with the widest half of an interval that the small protocol must reach, in the unit of the score
MAIN = (
    (Comparison("classification", "table2", "resnet50_carafe", "resnet50", "classification", "top1"), 2.0),
    (Comparison("downsamplers", "table3", "carafe", "conv", "bbox", "AP"), 2.0),
    (Comparison("upsamplers", "table4", "carafe", "nearest", "bbox", "AP"), 2.0),
    (Comparison("detection, boxes", "table7", "fpn_mask_head_backbone", "published", "bbox", "AP"), 2.0),
    (Comparison("detection, masks", "table7", "fpn_mask_head_backbone", "published", "segm", "AP"), 2.0),
    (Comparison("segmentation", "table8", "upernet_resnet50_carafe", "upernet_resnet50", "segmentation", "mIoU"), 1.5),
    (Comparison("parts of UperNet", "table9", "ppm_fpn_fuse", "published", "segmentation", "mIoU"), 1.5),
)
# rows that are known to be worse than the baseline of Table IV: the whole score of the one, the small objects of the other
CONTROLS = (
    Comparison("two thirds of the training", "table4", "control/shorter_training", "nearest", "bbox", "AP"),
    Comparison("no finest level, small objects", "table4", "control/no_finest_level", "nearest", "bbox", "APs"),
    Comparison("no finest level, medium objects", "table4", "control/no_finest_level", "nearest", "bbox", "APm"),
    Comparison("no finest level, large objects", "table4", "control/no_finest_level", "nearest", "bbox", "APl"),
    Comparison("no finest level, all objects", "table4", "control/no_finest_level", "nearest", "bbox", "AP"),
)
# tables whose scatter is tabulated by the quarter of the training, with baseline, task and score
SCATTERED = (("table4", "nearest", "bbox", "AP"), ("table7", "published", "segm", "AP"), ("table9", "published", "segmentation", "mIoU"))


def find_deviation(difference: Difference) -> float:
    """Return the standard deviation of the paired differences, from half the width of their interval."""
    assert difference.half is not None
    return difference.half * math.sqrt(difference.seeds) / t_quantile(difference.seeds - 1)


def count_seeds(deviation: float, half: float) -> int:
    """Count the seeds whose paired interval has at most this half width, for this standard deviation of the differences."""
    return next(seeds for seeds in range(2, 1000) if t_quantile(seeds - 1) * deviation <= half * math.sqrt(seeds))


def read_seconds(folder: Path) -> float:
    """Read the CPU seconds of a finished run."""
    return json.loads((folder / "result.json").read_text())["cpu_seconds"]


def measure_seconds(row: str) -> float:
    """Return the mean CPU seconds of the runs of a row, such as "table4/carafe", in the study, or those that its table is planned with."""
    places = ["/".join(place) for place in list_equal_rows(*row.split("/"), SCALE)]
    found = [read_seconds(path.parent) for place in places for path in RESULTS.glob(f"study/{place}_[0-9]/result.json")]
    return statistics.fmean(found) if found else OPTIONS.seconds[find_table(row)]


def cost_seed(comparison: Comparison) -> float:
    """Return the CPU seconds of one more seed of a comparison in the study, with its classifiers."""
    rows = [f"{comparison.table}/{row}" for row in (comparison.row, comparison.baseline)]
    starts = {read_pretraining(comparison.table, row, SCALE) for row in (comparison.row, comparison.baseline)} - {""}
    return sum(map(measure_seconds, [*rows, *starts]))


def tabulate_widths() -> str:
    """Tabulate the half widths of the main comparisons, before and after the change of the protocol, and what the wanted width takes."""
    heads = ["comparison", "rows", "wanted half width", "earlier: seeds", "half width", "study: seeds", "half width"]
    heads += ["deviation of the differences", "seeds for the wanted", "CPU hours to go"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for comparison, wanted in MAIN:
        earlier, study = (comparison.difference(study=study) for study in (False, True))
        known = [difference for difference in (study, earlier) if difference and difference.half is not None]
        if not known:
            raise FileNotFoundError(f"docs/results has no pairs of {comparison.table}/{comparison.row} and {comparison.baseline}")
        needed, done = count_seeds(deviation := find_deviation(known[0]), wanted), study.seeds if study else 0
        cells = [comparison.words, comparison.rows, f"{wanted:.1f}"]
        for difference in (earlier, study):
            cells += ["", ""] if difference is None or difference.half is None else [str(difference.seeds), f"{difference.half:.1f}"]
        hours = max(needed - done, 0) * cost_seed(comparison) / 3600
        lines.append(f"| {' | '.join([*cells, f'{deviation:.1f}', str(needed), f'{hours:.1f}'])} |")
    return "\n".join(lines)


def tabulate_controls() -> str:
    """Tabulate the controls: the baseline, the difference of every seed, and their mean with its interval."""
    lines = ["| control | rows | baseline | difference by seed | mean difference | |", f"|{' --- |' * 6}"]
    for control in CONTROLS:
        ours, baseline = control.pair(study=True)
        difference = control.difference(study=True)
        if difference is None:
            raise FileNotFoundError(f"docs/results/study has no pairs of {control.row} and {control.table}/{control.baseline}")
        apart = ", ".join(f"{ours[seed] - baseline[seed]:+.1f}" for seed in sorted(ours.keys() & baseline.keys()))
        resolved = difference.half is not None and abs(difference.mean) > difference.half
        cells = [control.words, control.rows, format_scores(summarize(baseline), 1), apart, format_difference(difference, 1, 0)]
        lines.append(f"| {' | '.join(cells)} | {'**resolved**' if resolved else 'not resolved'} |")
    return "\n".join(lines)


def tabulate_plan() -> str:
    """Tabulate the whole plan: its runs, those that are finished with the CPU hours that they took, and the hours of the others."""
    lines, totals = ["| table | rows | seeds | runs | finished | CPU hours used | CPU hours left |", f"|{' --- |' * 7}"], [0, 0, 0.0, 0.0]
    for sweep in plan_sweeps(OPTIONS.tables, OPTIONS.seeds):
        folders = {row: sweep._replace(rows=[row]).list_folders(RESULTS / "study") for row in sweep.rows}
        found = [read_seconds(folder) for row in sweep.rows for folder in folders[row] if is_finished(folder)]
        left = sum(measure_seconds(row) for row in sweep.rows for folder in folders[row] if not is_finished(folder))
        numbers = [len(sweep.rows) * sweep.seeds, len(found), sum(found) / 3600, left / 3600]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        lines.append(f"| {sweep.table} | {len(sweep.rows)} | {sweep.seeds} | {format_numbers(numbers)} |")
    return "\n".join([*lines, f"| all | | | {format_numbers(totals)} |"])


def format_numbers(numbers: list[float]) -> str:
    """Format two counts of runs and two numbers of hours as cells."""
    return f"{numbers[0]} | {numbers[1]} | {numbers[2]:.2f} | {numbers[3]:.1f}"


def tabulate_scatter() -> str:
    """Tabulate, by the quarter of the earlier trainings, the mean score, and the deviations of scores and paired differences over seeds."""
    lines = ["| table | of the training | mean score | deviation over seeds | deviation of the differences |", "|" + " --- |" * 5]
    for table, baseline, task, column in SCATTERED:
        metric = read_paper()[1][task][column]
        rows = {row["row"] for row in list_rows(read_paper()[0], table)}
        found = {row: setting for row in sorted(rows) if (setting := find_setting(table, row))}
        for quarter in range(4):
            scores = {
                row: {seed: 100 * [point[metric] for point in run.curve if metric in point][quarter] for seed, run in setting.runs.items()}
                for row, setting in found.items()
                if all(run.curve for run in setting.runs.values())
            }
            pairs = [
                [value - scores[baseline][seed] for seed, value in values.items() if seed in scores[baseline]]
                for row, values in scores.items()
                if row != baseline
            ]
            spread, apart = (
                math.sqrt(statistics.fmean(statistics.variance(values) for values in groups))
                for groups in ([list(values.values()) for values in scores.values()], pairs)
            )
            mean = statistics.fmean(value for values in scores.values() for value in values.values())
            lines.append(f"| {table}, {column} | {(quarter + 1) / 4:.0%} | {mean:.1f} | {spread:.2f} | {apart:.2f} |")
    return "\n".join(lines)
