"""Writes the measured tables into the pages of the documentation, from docs/measurements.

A folder of docs/measurements holds one run: about.json says when, on what and with which versions ("note_TABLE" stands above a table), and
the CSV files are those that carafepp-bench writes. A page says where a table goes, and the newest run on a "cpu" or on a "gpu" gives it:

    <!-- measured networks gpu -->
    <!-- end -->

`python docs/tables.py` writes what stands between the two lines.
"""

import contextlib
import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- measured (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, str]
# providers that are this project's operator
OURS = ("triton", "cpu")
# the columns of a module's parts
PARTS = ("channel_compressor", "compressor_norm", "content_encoder", "layers", "operator")
# sectors of memory over those with the Triton that needs the least, from which on a table names them
EXCESS = 1.15
# a table of a run without its columns
MISSING = "Not measured yet."
# keys of about.json, as pages name them
VERSIONS = {"torch": "PyTorch", "triton": "Triton", "python": "Python", "commit": "commit"}


def read_run(kind: str, name: str, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a table of the newest run on a kind of machine, and what describes this run.

    The times of the operator are followed by those of implementations that only the newest others.csv on such a machine has.

    Raises:
        FileNotFoundError: no run on such a machine has this table.
    """
    runs = [path for path in sorted(folder.iterdir()) if (path / name).exists()]
    about = {path: json.loads((path / "about.json").read_text()) for path in runs}
    if not (found := [path for path in runs if about[path]["kind"] == kind]):
        raise FileNotFoundError(f"no run in {folder} on a {kind} has {name}")
    newest = max(found, key=lambda path: about[path]["date"])
    rows = list(csv.DictReader((newest / name).open(newline="")))
    if name == "times.csv":
        with contextlib.suppress(FileNotFoundError):
            rows = add_rivals(rows, read_run(kind, "others.csv", folder)[0])
    return rows, about[newest]


def add_rivals(rows: list[Row], rivals: list[Row]) -> list[Row]:
    """Return the operator's times with those of implementations that only an earlier run on the same kind of GPU had.

    Their times relative to the operator's are those to its newer times. Maps that `rows` does not have are left out.
    """

    def name(row: Row) -> tuple[str, ...]:
        return name_map(row), layout_name(row), row["mode"]

    ours = {name(row): float(row["ms"]) for row in rows if row["provider"] in OURS}
    known = {(*name(row), row["provider"]) for row in rows}
    missing = [row for row in rivals if name(row) in ours and (*name(row), row["provider"]) not in known]
    return rows + [row | {"relative": str(float(row["ms"]) / ours[name(row)])} for row in missing]


def percent(value: float, digits: int = 0) -> str:
    """Format a fraction in per cent."""
    return f"{100 * value:.{digits}f} %"


def sides(text: str) -> str:
    """Format a list of sides, "[800, 1333]", as "800 x 1333"."""
    return " x ".join(re.findall(r"[0-9]+", text))


def layout_name(row: Row) -> str:
    """Name the dtype and the layout of a row."""
    return row["dtype"] + (", channels_last" if row["layout"] == "channels_last" else ", NCHW")


def name_map(row: Row) -> str:
    """Name the features of a row and what the operator does with them."""
    scale = f"down {row['down']}" if int(row["down"]) > 1 else f"up {row['up']}"
    groups = f", {row['groups']} groups" if int(row["groups"]) > 1 else ""
    return f"{sides(row['shape'])}, {scale}, k {row['kernel_size']}{groups}"


def number(text: str, digits: int = 3, factor: float = 1) -> str:
    """Format a number with significant digits; nothing for nothing."""
    if not text:
        return ""
    value = float(text) * factor
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def write_table(columns: list[str], lines: list[list[str]]) -> str:
    """Write a table in Markdown, without the columns that are empty in every line."""
    kept = [i for i, _ in enumerate(columns) if not lines or i == 0 or any(line[i] for line in lines)]
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in cells)


def write_tables(tables: dict[str, str]) -> str:
    """Write tables below each other, each with its title, so that a cell holds one number."""
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in tables.items())


def tabulate_operator(rows: list[Row]) -> str:
    """Write the operator's times, their ratio to a copy, and the times of other implementations relative to it, a table for each pass."""
    cases: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        cases.setdefault((name_map(row), layout_name(row)), {})[row["provider"], row["mode"]] = row
    rivals = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] not in (*OURS, "copy")))
    tables = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        lines = []
        for key, found in cases.items():
            ours: Row = next((row for (provider, of), row in found.items() if provider in OURS and of == mode), {})
            ratios = (number(found.get((rival, mode), {}).get("relative", ""), 2) for rival in rivals)
            lines.append([*key, number(ours.get("ms", ""), factor=1e3), number(ours.get("copies", ""), 2), *ratios])
        tables[mode.capitalize()] = write_table(["features", "type", "us", "x copy", *(r.replace("_", " ") for r in rivals)], lines)
    return write_tables(tables)


# the maps of the summary, its columns, and the implementations of its rows
SUMMARY_SHAPES = ("[1, 256, 50, 76]", "[2, 256, 100, 168]", "[512, 256, 14, 14]", "[64, 64, 112, 112]", "[1, 128, 33, 47]")
SUMMARY_TYPES = ("float16, channels_last", "float16, NCHW", "float32, channels_last", "float32, NCHW")
SUMMARY_NAMES = {
    "triton": "**CARAFE++**",
    "bilinear": "bilinear interpolation",
    "max_pool": "3 x 3 max pooling",
    "mmcv": "mmcv's operator",
    "compiled_definition": "torch.compile of the definition",
}


def tabulate_copies(rows: list[Row]) -> str:
    """Write the times over that of a copy, a table for each pass with a row for each map and implementation."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["provider"] in SUMMARY_NAMES and row["shape"] in SUMMARY_SHAPES:
            found.setdefault((name_map(row), row["provider"]), {}).setdefault(layout_name(row), {})[row["mode"]] = number(row["copies"], 2)
    tables = {}
    for mode in ("forward", "backward"):
        lines = []
        for name in dict.fromkeys(name for name, _ in found):
            for provider in SUMMARY_NAMES:
                cells = [found.get((name, provider), {}).get(kind, {}).get(mode, "") for kind in SUMMARY_TYPES]
                lines += [[name, SUMMARY_NAMES[provider], *cells]] if any(cells) else []
        tables[mode.capitalize()] = write_table(["features", "implementation", *SUMMARY_TYPES], lines)
    return write_tables(tables)


def tabulate_rivals(rows: list[Row]) -> str:
    """Write the times of other implementations over the operator's: a table for forward, and one for forward and backward together."""
    rivals = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "triton"))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((name_map(row), layout_name(row)), {})[row["provider"]] = row
    tables = {}
    for title, mode, parts in (("Forward", "forward", ["forward"]), ("Forward and backward", "step", ["forward", "backward"])):
        lines = []
        for key, times in found.items():
            taken = sum(float(times["triton"][f"{part}_us"]) for part in parts)
            lines.append([*key, f"{taken:,.0f}", *(times.get(rival, {}).get(f"{mode}_relative", "") for rival in rivals)])
        tables[title] = write_table(["features", "type", "operator, us", *(rival.replace("_", " ") for rival in rivals)], lines)
    return write_tables(tables)


def tabulate_modules(rows: list[Row]) -> str:
    """Write the times of CARAFE modules and the shares of their parts."""
    modules: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        scale = f"down {row['down']}" if int(row["down"]) > 1 else f"up {row['up']}"
        key = (f"{sides(row['shape'])}, {scale}", layout_name(row))
        modules.setdefault(key, {})[row["part"]] = row
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    lines = []
    for key, found in modules.items():
        line = list(key)
        for mode in ("forward", "step"):
            whole = found["module"].get(mode, "")
            line.append(number(whole, factor=1e3))
            for part in parts:
                taken = found.get(part, {}).get(mode, "")
                line.append(percent(float(taken) / float(whole)) if whole and taken else "")
        lines.append(line)
    shares = [part.replace("_", " ") for part in parts]
    return write_table(["features", "type", "forward, us", *shares, "forward and backward, us", *shares], lines)


def format_ratio(row: Row, mode: str) -> str:
    """Format the ratio of a mode to the baseline, with its interval if there is one."""
    if not (ratio := row.get(f"{mode}_relative", "")):
        return ""
    low, high = row.get(f"{mode}_relative_low", ""), row.get(f"{mode}_relative_high", "")
    return f"{float(ratio):.2f}" + (f" [{float(low):.2f}, {float(high):.2f}]" if low and low != high else "")


def tabulate_networks(rows: list[Row]) -> str:
    """Write parameters and FLOPs of networks, and for each mode a table of times, ratios to the baseline, shares and memory."""
    modes = {"inference": "Inference", "compiled": "Compiled", "graph": "CUDA graph", "step": "Training step"}
    named = [(f"{row['table']}/{row['row']}", row) for row in rows]
    counts = [
        [name, sides(row["size"]), f"{int(row['parameters']):,}" if row["parameters"] else "", number(row["flops"], 4, 1e-9)]
        for name, row in named
    ]
    tables = {"Parameters and FLOPs": write_table(["row", "size", "parameters", "GFLOPs"], counts)}
    for mode, title in modes.items():
        lines = []
        for name, row in named:
            if not row.get(f"{mode}_ms"):
                continue
            line = [name, row["step_batch" if mode == "step" else "batch"], number(row[f"{mode}_ms"]), format_ratio(row, mode)]
            shares = [row.get(f"{mode}_{part}_share", "") for part in ("operator", "rest")]
            # those of a network without CARAFE++ are 0
            line += [percent(float(share), 1) if share and float(share) else "" for share in shares]
            lines.append([*line, number(row.get(f"{mode}_peak_mb", ""))])
        if lines:
            tables[title] = write_table(["row", "batch", "ms", "time / baseline", "operator", "rest of the modules", "peak MB"], lines)
    return write_tables(tables)


def tabulate_fps(rows: list[Row]) -> str:
    """Write frames per second and times relative to the baseline beside the paper's."""
    lines = []
    for row in rows:
        if row.get("inference_ms") and row["paper_fps"]:
            name, size = f"{row['table']}/{row['row']}", sides(row["size"])
            ratio = number(row["paper_relative"]) and f"{float(row['paper_relative']):.2f}"
            lines.append([name, size, number(row["inference_fps"]), format_ratio(row, "inference"), row["paper_fps"], ratio])
    if not lines:
        return MISSING
    return write_table(["row", "size", "fps", "time / baseline", "paper: fps", "paper: time / baseline"], lines)


# features of the table by which to choose: a level of the pyramid of an 800 x 1344 image, and the input of the third stage of a ResNet-50
# at 224 x 224
COMPARED = {"upsampler": "[1, 256, 50, 84]", "downsampler": "[1, 256, 56, 56]"}


def read_sources(group: str) -> dict[str, Row]:
    """Read source, licence and strength of the samplers of a group from sampler_sources.csv, by name and in its order."""
    with (DOCS / "sampler_sources.csv").open(newline="") as file:
        return {row["sampler"]: row for row in csv.DictReader(file) if row["group"] == group}


def tabulate_choice(rows: list[Row], group: str) -> str:
    """Write what a user chooses a sampler by: parameters, FLOPs, times, memory, guide, source, licence and strength."""
    found = {row["sampler"]: row for row in rows if row["group"] == group and row["shape"] == COMPARED[group]}
    lines = []
    for name, source in read_sources(group).items():
        row = found.pop(name)
        line = [f"`{name}`", f"{int(row['parameters']):,}", f"{float(row['flops_per_pixel']):,.0f}"]
        for mode in ("forward", "step"):
            line.append(f"{number(row[f'{mode}_ms'])} ({number(row[f'{mode}_relative'], 2)})")
        line += [number(row["peak_mb"]), "yes" if row["guided"] == "True" else ""]
        lines.append([*line, source["source"], source["licence"], source["strength"]])
    if found:
        raise KeyError(f"sampler_sources.csv has no {group} {', '.join(found)}")
    times = ["forward, ms", "forward and backward, ms"]
    return write_table([group, "parameters", "FLOPs", *times, "MB", "guide", "source", "licence of its code", "good at"], lines)


def tabulate_times(rows: list[Row], group: str) -> str:
    """Write times and memory of every sampler of a group at the compared map, whatever the batch."""
    site = COMPARED[group].partition(",")[2]
    found = {row["sampler"]: row for row in rows if row["group"] == group and row["shape"].partition(",")[2] == site}
    lines = []
    for name in read_sources(group):
        times = (f"{number(found[name][f'{mode}_ms'])} ({number(found[name][f'{mode}_relative'], 2)})" for mode in ("forward", "step"))
        lines.append([f"`{name}`", *times, number(found[name]["peak_mb"])])
    return write_table([group, "forward, ms", "forward and backward, ms", "MB"], lines)


def tabulate_sites(rows: list[Row], group: str) -> str:
    """Write the times at every site of a group: a table for forward, and one for forward and backward together."""
    found = {(row["sampler"], row["shape"]): row for row in rows if row["group"] == group}
    shapes = list(dict.fromkeys(shape for _, shape in found))
    columns = [group, *(sides(shape).partition(" x ")[2] for shape in shapes)]
    tables = {}
    for title, mode in (("Forward", "forward"), ("Forward and backward", "step")):
        lines = [[f"`{name}`", *(number(found[name, shape][f"{mode}_ms"]) for shape in shapes)] for name in read_sources(group)]
        tables[title] = write_table(columns, lines)
    return write_tables(tables)


def tabulate_attention(rows: list[Row]) -> str:
    """Write times and memory of attention to windows by the operator, and to copies at the target size."""
    passes = {"forward": "forward", "step": "forward and backward"}
    forms = {"operator": "`attend_windows`", "copies": "copies at the target size"}
    lines = [[passes[row["pass"]], forms[row["form"]], number(row["ms"]), number(row["peak_mb"])] for row in rows]
    return write_table(["pass", "form", "ms", "MB"], lines)


def tabulate_matrix(rows: list[Row]) -> str:
    """Write what came of the cases of every version of Triton, a column for each target."""
    found: dict[str, dict[str, list[Row]]] = {}
    least: dict[tuple[str, str], int] = {}
    for row in rows:
        found.setdefault(row["triton"], {}).setdefault(row["target"], []).append(row)
        if row.get("sectors"):
            case = row["target"], row["case"]
            least[case] = min(least.get(case, int(row["sectors"])), int(row["sectors"]))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [[name, *(describe_cases(cells.get(target, []), least) for target in targets)] for name, cells in found.items()]
    return write_table(["Triton", *targets], lines)


def describe_cases(rows: list[Row], least: dict[tuple[str, str], int]) -> str:
    """Say how many cases compile, equal float64, spill registers and access more sectors than the least, and what prevents the others."""
    if not rows:
        return ""
    compiled = [row for row in rows if row["registers"]]
    parts = [f"{len(compiled)} of {len(rows)} compiled"]
    if emulated := [row["equal"] == "True" for row in rows if row["equal"]]:
        parts.append(f"{sum(emulated)} of {len(emulated)} equal")
    spilled = sum(int(row["spills"]) > 0 for row in compiled)
    parts.append(f"spills in {spilled}" if spilled else "no spills")
    excess = max((int(row["sectors"]) / least[row["target"], row["case"]] for row in rows if row.get("sectors")), default=1)
    if excess >= EXCESS:
        parts.append(f"up to {excess:.1f} x the sectors")
    return "; ".join([*parts, *dict.fromkeys(row["problem"] for row in rows if row["problem"])])


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "operator": ("times.csv", tabulate_operator),
    "copies": ("times.csv", tabulate_copies),
    "rivals": ("rivals.csv", tabulate_rivals),
    "modules": ("module.csv", tabulate_modules),
    "networks": ("models.csv", tabulate_networks),
    "fps": ("models.csv", tabulate_fps),
    "matrix": ("matrix.csv", tabulate_matrix),
    "attention": ("attention.csv", tabulate_attention),
    "upsampler_times": ("samplers.csv", partial(tabulate_times, group="upsampler")),
    "downsampler_times": ("samplers.csv", partial(tabulate_times, group="downsampler")),
    "upsamplers": ("samplers.csv", partial(tabulate_choice, group="upsampler")),
    "downsamplers": ("samplers.csv", partial(tabulate_choice, group="downsampler")),
    "upsampler_sites": ("samplers.csv", partial(tabulate_sites, group="upsampler")),
    "downsampler_sites": ("samplers.csv", partial(tabulate_sites, group="downsampler")),
}


def fill_page(text: str, folder: Path = DOCS / "measurements") -> str:
    """Return a page with its measured tables.

    Raises:
        FileNotFoundError: no run has a table of the page.
        KeyError: the page asks for a table that does not exist.
    """

    def fill(match: re.Match) -> str:
        start, table, kind, end = match.groups()
        name, tabulate = TABLES[table]
        rows, about = read_run(kind, name, folder)
        versions = ", ".join(f"{label} {about[key]}" for key, label in VERSIONS.items() if about.get(key))
        if (written := tabulate(rows)) == MISSING:
            return f"{start}{MISSING}\n\n{end}"
        note = "\n" + about[f"note_{table}"] if f"note_{table}" in about else ""
        return f"{start}*{about['device']}, {about['date']}, {versions}.*{note}\n\n{written}\n\n{end}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if (filled := fill_page(text)) != text:
            page.write_text(filled)
            print(f"tables written to {page}")
