"""Writes the tables of runs into docs/results.md and README.md, from the result.json files in docs/results.

A page says where a table goes, and `python docs/results.py` writes what stands between the two lines:

    <!-- results claims -->
    <!-- end -->
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

from carafepp.scripts.common.paper import list_rows, read_paper, unit_factor
from carafepp.scripts.reporting import Setting, group_runs, read_runs, render_tables, tabulate_paper
from carafepp.scripts.reporting.cells import format_difference, format_scores
from carafepp.scripts.reporting.statistics import Difference, compare_paired, summarize
from carafepp.scripts.reporting.tables import SettingFinder
from omegaconf import OmegaConf

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (DOCS / "results.md", DOCS.parent / "README.md")


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


def tabulate_all() -> str:
    """Render every table as `carafepp-report runs=docs/results format=markdown` prints it."""
    options = OmegaConf.load(DOCS.parent / "conf" / "report.yaml")
    return render_tables(tabulate_paper(read_settings(), options.metrics, options.digits, options.baseline), "markdown")


TABLES = {"claims": tabulate_claims, "costs": tabulate_costs, "sizes": tabulate_sizes, "boundaries": tabulate_boundaries, "tables": tabulate_all}


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
