"""Writes the tables of runs into docs/results.md, docs/protocol.md and README.md, from the result.json files in docs/results.

A page says where a table goes, and `python docs/results.py` writes what stands between the two lines:

    <!-- results claims -->
    <!-- end -->
"""

import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from carafepp.scripts.common.paper import list_rows, read_paper, unit_factor
from carafepp.scripts.reporting import Setting, group_runs, read_runs, render_tables, tabulate_paper
from carafepp.scripts.reporting.cells import format_difference, format_scores
from carafepp.scripts.reporting.statistics import Difference, compare_paired, summarize, t_quantile
from carafepp.scripts.reporting.tables import SettingFinder
from omegaconf import OmegaConf

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (DOCS / "results.md", DOCS / "protocol.md", DOCS.parent / "README.md")


class Claim(NamedTuple):
    """A claim of the paper's abstract, and the two rows of a table that test it."""

    words: str
    table: str
    row: str
    baseline: str
    task: str
    column: str


CLAIMS = (
    Claim("gain in object detection", "table7", "fpn_mask_head_backbone", "published", "bbox", "AP"),
    Claim("gain in instance segmentation", "table7", "fpn_mask_head_backbone", "published", "segm", "AP"),
    Claim("gain in semantic segmentation", "table8", "upernet_resnet50_carafe", "upernet_resnet50", "segmentation", "mIoU"),
    Claim("gain in inpainting", "table10", "global_local_carafe", "global_local", "inpainting", "psnr_db"),
    Claim("a large receptive field", "table13", "encoder3_kernel5", "encoder1_kernel3", "bbox", "AP"),
    Claim("adaptive kernels, against one fixed kernel", "table4", "carafe", "deconv", "bbox", "AP"),
    Claim("better than interpolation", "table4", "carafe", "nearest", "bbox", "AP"),
    Claim("better than pooling", "table3", "carafe", "max_pool", "bbox", "AP"),
)
# rows of Table IX, as the README calls them
NETWORKS = {
    "published": "as published",
    "same_flops": "wider, FLOPs of CARAFE++",
    "same_parameters": "wider, parameters of CARAFE++",
    "ppm_fpn_fuse_backbone": "CARAFE++ in every slot",
    "ppm_fpn_fuse": "CARAFE++ in the decoder",
}
# those that the others are compared with
COMPARED = {"published": "as published", "same_flops": "wider, FLOPs", "same_parameters": "wider, parameters"}

# table, row, baseline and task of comparisons by the size of objects
SIZED = (
    ("table4", "carafe", "nearest", "bbox"),
    ("table4", "carafe", "deconv", "bbox"),
    ("table3", "carafe", "conv", "bbox"),
    ("table7", "fpn", "published", "bbox"),
    ("table7", "fpn_mask_head", "published", "segm"),
)

# main comparisons, with the widest half of an interval that the small protocol aims at, in the unit of the score
MAIN = (
    (Claim("classification", "table2", "resnet50_carafe", "resnet50", "classification", "top1"), 2.0),
    (Claim("downsamplers", "table3", "carafe", "conv", "bbox", "AP"), 2.0),
    (Claim("upsamplers", "table4", "carafe", "nearest", "bbox", "AP"), 2.0),
    (Claim("detection, boxes", "table7", "fpn_mask_head_backbone", "published", "bbox", "AP"), 2.0),
    (Claim("detection, masks", "table7", "fpn_mask_head_backbone", "published", "segm", "AP"), 2.0),
    (Claim("segmentation", "table8", "upernet_resnet50_carafe", "upernet_resnet50", "segmentation", "mIoU"), 1.5),
    (Claim("parts of UperNet", "table9", "ppm_fpn_fuse", "published", "segmentation", "mIoU"), 1.5),
)
# tables whose scatter is tabulated by the quarter of the training, with baseline, task and score
SCATTERED = (("table4", "nearest", "bbox", "AP"), ("table7", "published", "segm", "AP"), ("table9", "published", "segmentation", "mIoU"))


@functools.cache
def read_settings() -> list[Setting]:
    """Read the runs in docs/results, grouped by configuration."""
    return group_runs(read_runs([DOCS / "results"])[0], read_paper()[0])[0]


def find_values(table: str, row: str, task: str, column: str) -> dict[int, float]:
    """Return a score by seed, in the unit of the paper; a row without runs has none."""
    setting = SettingFinder(read_settings()).find(table, row, {"scale": "small"}, {})
    metric = read_paper()[1][task][column]
    return {seed: unit_factor(column) * value for seed, value in setting.values(metric).items()} if setting else {}


def judge(difference: Difference | None) -> str:
    """Say whether a difference, of which more is better, shows a claim: its interval lies above zero, contains it, or lies below."""
    if difference is None or difference.half is None:
        return "no runs"
    if abs(difference.mean) <= difference.half:
        return "not shown"
    return "**shown**" if difference.mean > 0 else "**contradicted**"


def tabulate_claims() -> str:
    """Tabulate the claims: the rows that test them, the difference in the paper, ours with its interval, and what this shows."""
    tables = read_paper()[0]
    lines = ["| claim | rows | paper | here | at this scale |", "| --- | --- | --- | --- | --- |"]
    for claim in CLAIMS:
        ours, others = (find_values(claim.table, row, claim.task, claim.column) for row in (claim.row, claim.baseline))
        found = {row["row"]: row for row in list_rows(tables, claim.table) if row["task"] == claim.task}
        published = found[claim.row][claim.column] - found[claim.baseline][claim.column]
        difference = compare_paired(ours, others)
        unit = claim.column.replace("psnr_db", "dB")
        rows = f"{claim.table}: `{claim.row}` - `{claim.baseline}`, {unit}"
        lines.append(f"| {claim.words} | {rows} | {published:+.2f} | {format_difference(difference, 2, 0)} | {judge(difference)} |")
    return "\n".join(lines)


def tabulate_costs() -> str:
    """Tabulate UperNet at equal cost: scores of each network, and its paired differences from the published and the wider ones."""
    finder = SettingFinder(read_settings())
    settings = {row: finder.find("table9", row, {"scale": "small"}, {}) for row in NETWORKS}
    scores = {row: find_values("table9", row, "segmentation", "mIoU") for row in NETWORKS}
    heads = ["network", "parameters", "GFLOPs", "seeds", "mIoU, %", *(f"minus {name}" for name in COMPARED.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row, setting in settings.items():
        if setting is None:
            raise FileNotFoundError(f"docs/results has no run of table9/{row}")
        run, values = next(iter(setting.runs.values())), scores[row]
        # each pair once
        against = [other for other in COMPARED if list(NETWORKS).index(other) < list(NETWORKS).index(row)]
        differences = [format_difference(compare_paired(values, scores[other]), 1, 0) if other in against else "" for other in COMPARED]
        cells = [NETWORKS[row], f"{run.parameters:,}", f"{run.flops / 1e9:.3f}", str(len(values)), format_scores(summarize(values), 1)]
        lines.append(f"| {' | '.join([*cells, *differences])} |")
    return "\n".join(lines)


def tabulate_sizes() -> str:
    """Tabulate the differences in AP of objects of each size, ours with intervals and those of the paper."""
    names = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
    heads = [f"{name}, {whose}" for name in names.values() for whose in ("paper", "here")]
    lines = [f"| rows | {' | '.join(heads)} |", f"|{' --- |' * (1 + len(heads))}"]
    for table, row, baseline, task in SIZED:
        found = {figures["row"]: figures for figures in list_rows(read_paper()[0], table) if figures["task"] == task}
        cells = [f"{table}: `{row}` - `{baseline}`, {'masks' if task == 'segm' else 'boxes'}"]
        for column in names:
            cells.append(f"{found[row][column] - found[baseline][column]:+.1f}")
            ours, others = (find_values(table, name, task, column) for name in (row, baseline))
            cells.append(format_difference(compare_paired(ours, others), 1, 0))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_boundaries() -> str:
    """Tabulate mIoU and boundary IoU of the networks of equal cost, for the runs whose checkpoint carafepp-eval has scored (eval.json)."""
    lines = ["| network | seeds | mIoU, % | boundary IoU, % | boundary IoU / mIoU |", f"|{' --- |' * 5}"]
    for row, name in NETWORKS.items():
        found = {path.parent.name.rpartition("_")[2]: path for path in sorted(DOCS.glob(f"results/table9/{row}_[0-9]/eval.json"))}
        scores = {int(seed): json.loads(path.read_text())["metrics"] for seed, path in found.items()}
        if scores:
            regions, boundaries = ({seed: 100 * found[f"val/{key}"] for seed, found in scores.items()} for key in ("mIoU", "boundary_IoU"))
            ratios = summarize({seed: boundaries[seed] / region for seed, region in regions.items()})
            columns = [format_scores(summarize(regions), 1), format_scores(summarize(boundaries), 1), format_scores(ratios, 3)]
            lines.append(f"| {' | '.join([name, ', '.join(map(str, scores)), *columns])} |")
    return "\n".join(lines)


def count_seeds(deviation: float, half: float) -> int:
    """Count the seeds whose paired interval has at most this half width, for this standard deviation of the differences."""
    return next(seeds for seeds in range(2, 1000) if t_quantile(seeds - 1) * deviation <= half * math.sqrt(seeds))


def tabulate_seeds() -> str:
    """Tabulate the main comparisons: the half width of the interval, and the seeds and hours for the width that is aimed at."""
    finder = SettingFinder(read_settings())
    heads = [
        "comparison",
        "rows",
        "seeds",
        "half width",
        "aim",
        "deviation of the differences",
        "half width at 5 seeds",
        "seeds for the aim",
    ]
    heads.append("hours of these seeds")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for claim, aim in MAIN:
        ours, others = (find_values(claim.table, row, claim.task, claim.column) for row in (claim.row, claim.baseline))
        difference = compare_paired(ours, others)
        pair = [finder.find(claim.table, row, {"scale": "small"}, {}) for row in (claim.row, claim.baseline)]
        if difference is None or difference.half is None:
            raise FileNotFoundError(f"docs/results has no pairs of {claim.table}/{claim.row} and {claim.baseline}")
        deviation = difference.half * math.sqrt(difference.seeds) / t_quantile(difference.seeds - 1)
        needed = count_seeds(deviation, aim)
        taken = sum(setting.cpu_seconds or setting.seconds for setting in pair if setting)
        cells = [claim.words, f"{claim.table}: `{claim.row}` - `{claim.baseline}`, {claim.column}", str(difference.seeds)]
        cells += [
            f"{difference.half:.1f}",
            f"{aim:.1f}",
            f"{deviation:.1f}",
            f"{t_quantile(4) * deviation / math.sqrt(5):.1f}",
            str(needed),
        ]
        lines.append(f"| {' | '.join([*cells, f'{needed * taken / 3600:.1f}'])} |")
    return "\n".join(lines)


def tabulate_scatter() -> str:
    """Tabulate, by the quarter of the training, the mean score, and the deviations over seeds of scores and of paired differences."""
    finder = SettingFinder(read_settings())
    lines = ["| table | of the training | mean score | deviation over seeds | deviation of the differences |", "|" + " --- |" * 5]
    for table, baseline, task, column in SCATTERED:
        metric = read_paper()[1][task][column]
        rows = {row["row"] for row in list_rows(read_paper()[0], table)}
        found = {row: setting for row in sorted(rows) if (setting := finder.find(table, row, {"scale": "small"}, {}))}
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


def tabulate_all() -> str:
    """Render every table as `carafepp-report runs=docs/results format=markdown` prints it."""
    options = OmegaConf.load(DOCS.parent / "conf" / "report.yaml")
    return render_tables(tabulate_paper(read_settings(), options.metrics, options.digits, options.baseline), "markdown")


TABLES = {
    "claims": tabulate_claims,
    "costs": tabulate_costs,
    "sizes": tabulate_sizes,
    "boundaries": tabulate_boundaries,
    "seeds": tabulate_seeds,
    "scatter": tabulate_scatter,
    "tables": tabulate_all,
}


def fill_page(text: str) -> str:
    """Return a page with its tables of runs.

    Raises:
        KeyError: the page asks for a table that does not exist.
    """
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        if (filled := fill_page(text := page.read_text())) != text:
            page.write_text(filled)
            print(f"tables written to {page}")
