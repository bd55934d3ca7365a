"""Writes the tables of runs into docs/results.md, docs/protocol.md and README.md, from the result.json files in docs/results.

A page says where a table goes, and `python docs/results.py` writes what stands between the two lines:

    <!-- results claims -->
    <!-- end -->
"""

import re
from pathlib import Path

from carafepp.scripts.common.paper import list_rows, read_paper
from carafepp.scripts.reporting import render_tables, tabulate_paper
from carafepp.scripts.reporting.cells import format_difference, format_scores
from carafepp.scripts.reporting.statistics import compare_paired, summarize
from comparisons import Comparison, find_setting, find_values, judge, read_settings
from omegaconf import OmegaConf
from protocol import tabulate_controls, tabulate_plan, tabulate_scatter, tabulate_widths

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = (DOCS / "results.md", DOCS / "protocol.md", DOCS.parent / "README.md")

# claims of the paper's abstract, each with the two rows that test it
CLAIMS = (
    Comparison("gain in object detection", "table7", "fpn_mask_head_backbone", "published", "bbox", "AP"),
    Comparison("gain in instance segmentation", "table7", "fpn_mask_head_backbone", "published", "segm", "AP"),
    Comparison("gain in semantic segmentation", "table8", "upernet_resnet50_carafe", "upernet_resnet50", "segmentation", "mIoU"),
    Comparison("gain in inpainting", "table10", "global_local_carafe", "global_local", "inpainting", "psnr_db"),
    Comparison("a large receptive field", "table13", "encoder3_kernel5", "encoder1_kernel3", "bbox", "AP"),
    Comparison("adaptive kernels, against one fixed kernel", "table4", "carafe", "deconv", "bbox", "AP"),
    Comparison("better than interpolation", "table4", "carafe", "nearest", "bbox", "AP"),
    Comparison("better than pooling", "table3", "carafe", "max_pool", "bbox", "AP"),
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

# scores by the size of objects
SIZES = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
# table, row, baseline and task of comparisons by the size of objects
SIZED = (
    ("table4", "carafe", "nearest", "bbox"),
    ("table4", "carafe", "deconv", "bbox"),
    ("table3", "carafe", "conv", "bbox"),
    ("table7", "fpn_mask_head_backbone", "published", "bbox"),
    ("table7", "fpn_mask_head_backbone", "published", "segm"),
)
# the stride of the finest level that the box head reads, the upsamplers above it, and the rows with CARAFE++ and with nearest neighbour
DEPTHS = (
    (4, 3, "carafe", "nearest"),
    (8, 2, "control/no_finest_level_carafe", "control/no_finest_level"),
)
# upsamplers of the pyramid by name: rows of Table IV, and those of later papers
PYRAMIDS = {
    "nearest neighbour": "nearest",
    "deconvolution": "deconv",
    "CARAFE++": "carafe",
    "DySample": "successors/fpn_dysample",
}


def tabulate_claims() -> str:
    """Tabulate the claims: the rows that test them, the difference in the paper, and what the study and the earlier runs show of it."""
    tables = read_paper()[0]
    lines = ["| claim | rows | paper | study | verdict | earlier runs | verdict |", f"|{' --- |' * 7}"]
    for claim in CLAIMS:
        found = {row["row"]: row for row in list_rows(tables, claim.table) if row["task"] == claim.task}
        cells = [claim.words, claim.rows, f"{found[claim.row][claim.column] - found[claim.baseline][claim.column]:+.2f}"]
        for study in (True, False):
            difference = claim.difference(study)
            seeds = f", {difference.seeds} seeds" if difference else ""
            cells += [f"{format_difference(difference, 2, 0)}{seeds}", judge(difference)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_costs() -> str:
    """Tabulate UperNet at equal cost in the study: scores of each network, and its paired differences from the published and wider ones."""
    settings = {row: find_setting("table9", row, study=True) for row in NETWORKS}
    scores = {row: find_values("table9", row, "segmentation", "mIoU", study=True) for row in NETWORKS}
    heads = ["network", "parameters", "GFLOPs", "seeds", "mIoU, %", *(f"minus {name}" for name in COMPARED.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row, setting in settings.items():
        if setting is None:
            raise FileNotFoundError(f"docs/results/study has no run of table9/{row}")
        run, values = next(iter(setting.runs.values())), scores[row]
        # each pair once
        against = [other for other in COMPARED if list(NETWORKS).index(other) < list(NETWORKS).index(row)]
        differences = [format_difference(compare_paired(values, scores[other]), 1, 0) if other in against else "" for other in COMPARED]
        cells = [NETWORKS[row], f"{run.parameters:,}", f"{run.flops / 1e9:.3f}", str(len(values)), format_scores(summarize(values), 1)]
        lines.append(f"| {' | '.join([*cells, *differences])} |")
    return "\n".join(lines)


def tabulate_sizes() -> str:
    """Tabulate the differences in AP of objects of each size: of the paper, the earlier runs, and the study where it has them."""
    heads = [f"{name}, {whose}" for name in SIZES.values() for whose in ("paper", "here")]
    lines = [f"| rows | runs | {' | '.join(heads)} |", f"|{' --- |' * (2 + len(heads))}"]
    for table, row, baseline, task in SIZED:
        found = {figures["row"]: figures for figures in list_rows(read_paper()[0], table) if figures["task"] == task}
        for study in (False, True):
            differences = {column: Comparison("", table, row, baseline, task, column).difference(study) for column in SIZES}
            if not all(differences.values()):
                continue
            cells = [f"{table}: `{row}` - `{baseline}`, {'masks' if task == 'segm' else 'boxes'}", "study" if study else "earlier"]
            for column, difference in differences.items():
                cells += [f"{found[row][column] - found[baseline][column]:+.1f}", format_difference(difference, 1, 0)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_boundaries() -> str:
    """Tabulate mIoU and boundary IoU of the networks of equal cost in the study, and the paired differences of their ratio."""
    heads = ["network", "seeds", "mIoU, %", "boundary IoU, %", "boundary IoU / mIoU", f"minus {COMPARED['published']}"]
    lines, ratios = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"], {}
    for row, name in NETWORKS.items():
        setting = find_setting("table9", row, study=True)
        if setting is None:
            raise FileNotFoundError(f"docs/results/study has no run of table9/{row}")
        regions, boundaries = ({s: 100 * score for s, score in setting.values(f"val/{key}").items()} for key in ("mIoU", "boundary_IoU"))
        ratios[row] = {seed: boundaries[seed] / region for seed, region in regions.items()}
        scores = [*(format_scores(summarize(found), 1) for found in (regions, boundaries)), format_scores(summarize(ratios[row]), 3)]
        difference = "" if row == "published" else format_difference(compare_paired(ratios[row], ratios["published"]), 3, 0)
        lines.append(f"| {' | '.join([name, str(len(regions)), *scores, difference])} |")
    return "\n".join(lines)


def tabulate_depths() -> str:
    """Tabulate the gain of CARAFE++ over nearest neighbour in the study, by the number of upsamplers that the box head's features pass."""
    heads = ["the box head reads from stride", "upsamplers", "seeds", *(f"gain in {name}" for name in ("AP", *SIZES.values()))]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for stride, upsamplers, row, baseline in DEPTHS:
        pairs = [Comparison("", "table4", row, baseline, "bbox", column).difference(study=True) for column in ("AP", *SIZES)]
        if pairs[0] is None:
            raise FileNotFoundError(f"docs/results/study has no pairs of table4/{row} and {baseline}")
        cells = [str(stride), str(upsamplers), str(pairs[0].seeds), *(format_difference(pair, 1, 0) for pair in pairs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_samplers() -> str:
    """Tabulate upsamplers of the pyramid in the study: their cost, their scores, and CARAFE++'s paired difference from them."""
    heads = ["upsampler", "parameters", "GFLOPs", "seeds", "AP", "minus nearest", "CARAFE++ minus it"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    (nearest, ours) = (find_values("table4", row, "bbox", "AP", study=True) for row in ("nearest", "carafe"))
    for name, row in PYRAMIDS.items():
        setting, values = find_setting("table4", row, study=True), find_values("table4", row, "bbox", "AP", study=True)
        if setting is None:
            continue
        run = next(iter(setting.runs.values()))
        differences = ["" if row in ("nearest",) else format_difference(compare_paired(values, nearest), 1, 0)]
        differences.append("" if row in ("carafe",) else format_difference(compare_paired(ours, values), 1, 0))
        cells = [name, f"{run.parameters:,}", f"{run.flops / 1e9:.4f}", str(len(values)), format_scores(summarize(values), 1)]
        lines.append(f"| {' | '.join([*cells, *differences])} |")
    return "\n".join(lines)


def tabulate_all() -> str:
    """Render every table as `carafepp-report runs=docs/results format=markdown` prints it, without the rows that have no run."""
    options = OmegaConf.load(DOCS.parent / "conf" / "report.yaml")
    tables = tabulate_paper(read_settings(), options.metrics, options.digits, options.baseline)
    for table in tables:
        table.lines = [line for line in table.lines if line.setting]
    # they are parts of a section of the page
    return render_tables(tables, "markdown").replace("## ", "### ")


TABLES = {
    "claims": tabulate_claims,
    "costs": tabulate_costs,
    "sizes": tabulate_sizes,
    "boundaries": tabulate_boundaries,
    "depths": tabulate_depths,
    "samplers": tabulate_samplers,
    "widths": tabulate_widths,
    "controls": tabulate_controls,
    "plan": tabulate_plan,
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
