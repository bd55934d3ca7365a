"""The network of a checkpoint as a file for other programs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ...tasks.exportable import Exportable
from ...tasks.writing import replace_file, write_atomically
from ..common.checkpoints import load_task
from ..common.options import look_up, read_options
from ..common.sites import DTYPES
from .checks import TOLERANCES, Difference, compare, format_size, make_inputs, run_network
from .formats import FORMATS, Tracing, check_packages
from .sizes import Ranges, Size, read_ranges


def describe(task: str, exportable: Exportable, ranges: Ranges, dtype: str, config: DictConfig) -> dict[str, Any]:
    """Return the facts that the file holds: what its inputs and outputs are, and where it comes from."""
    content = json.dumps(OmegaConf.to_container(config), sort_keys=True)
    kinds = {"images": "RGB", "masks": "masks"}
    return {
        "task": task,
        "inputs": {name: f"[N, {count}, H, W], {kinds[name]} in [0, 1]" for name, count in exportable.inputs.items()},
        "outputs": exportable.outputs,
        **exportable.facts,
        **ranges._asdict(),
        "divisibility": 1,  # all networks of carafepp take any height and width
        "dtype": dtype,
        "versions": {name: version(name) for name in ("carafepp", "torch")},
        "configuration": hashlib.sha256(content.encode()).hexdigest(),
    }


def find_stride(sides: Sequence[tuple[int, int]]) -> int | None:
    """Return the power of two for which sides of n pixels become ceil(n / stride), or None if there is none.

    Args:
        sides: pairs of a side of an input and the same side of an output.
    """
    strides = (2**power for power in range(8))
    return next((stride for stride in strides if all(-(-whole // stride) == side for whole, side in sides)), None)


def list_strides(expected: dict[Size, list[Tensor]], outputs: Iterable[str]) -> dict[str, int | None]:
    """Return the stride (see `find_stride`) of every output that is a map."""
    strides = {}
    for name, *values in zip(outputs, *expected.values(), strict=True):
        if values[0].dim() == 4:
            shapes = zip(expected, (value.shape for value in values), strict=True)
            strides[name] = find_stride([(size[axis], shape[axis + 1]) for size, shape in shapes for axis in (1, 2)])
    return strides


def explain(error: Exception, checkpoint: str, ranges: Ranges) -> str:
    """Say what of a network a format does not take: a part of the range of sizes, or the network itself."""
    if "Constraints violated" not in str(error):
        return f"the network of checkpoint={checkpoint}: {error}"
    asked = ", ".join(f"{name}=[{low},{high}]" for name, (low, high) in ranges._asdict().items() if low < high)
    limits = "\n".join(line for line in str(error).splitlines() if line.startswith("  - "))
    return (
        f"all of {asked}: at the least sizes, a map of the network may have a side of one pixel, which PyTorch takes for fixed. Give a "
        f"range that begins later, or size=. PyTorch says:\n{limits}"
    )


def export(cfg: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any], list[Difference]]:
    """Write the file of a checkpoint if it agrees with the network.

    Returns:
        The path of the file, its facts and its differences from the network.

    Raises:
        ModuleNotFoundError: a package of the format is missing.
        ValueError: an option is wrong, the network cannot be exported, or the file differs from the network.
    """
    (form,) = look_up("format", [cfg["format"]], FORMATS)
    (dtype,) = look_up("dtype", [cfg["dtype"]], {name: dtype for name, dtype in DTYPES.items() if dtype in TOLERANCES})
    check_packages(cfg["format"])
    ranges = read_ranges(cfg["size"], cfg["height"], cfg["width"], cfg["batch"])
    task, config = load_task(cfg["checkpoint"], DictConfig(cfg["task"]), cfg["trust"])
    exportable = task.exportable()
    network = exportable.network.eval().requires_grad_(False).to(cfg["device"])
    expected = run_network(network, exportable.inputs, ranges.checked(), cfg["device"])
    facts = describe(type(task).__name__.lower(), exportable, ranges, cfg["dtype"], config)
    facts["strides"] = list_strides(expected, exportable.outputs)
    examples = tuple(value.to(cfg["device"], dtype) for value in make_inputs(exportable.inputs, ranges.example()))
    tracing = Tracing(
        network.to(dtype), examples, [*exportable.inputs], [*exportable.outputs], ranges.dimensions(), decompose=cfg["decompose"]
    )
    try:
        content = form.write(tracing, facts)
    except Exception as error:
        raise ValueError(f"format={cfg['format']} does not take {explain(error, cfg['checkpoint'], ranges)}") from error
    read = form.read(content)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [output.cpu() for output in read([value.to(cfg["device"]) for value in inputs])]

    differences = compare(run, expected, exportable.inputs, [*exportable.outputs], dtype)
    path = folder / f"network{form.suffix}"
    with replace_file(path, "wb") as file:
        file.write(content)
    return path, facts, differences


def write_export(cfg: DictConfig) -> None:
    """Export the network of a checkpoint, and write its facts and its differences from the network to export.json."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    path, facts, differences = export(read_options(cfg), folder)
    report = {"checkpoint": cfg.checkpoint, "facts": facts, "differences": [difference._asdict() for difference in differences]}
    write_atomically(folder / "export.json", json.dumps(report, indent=2) + "\n")
    for difference in differences:
        absolute, relative = f"{difference.absolute:.2e}", f"{difference.relative:.1e}"
        print(f"{format_size(difference[:3]):28s} largest difference {absolute}, {relative} of the largest output")
    if facts.get("part"):
        print(f"the file holds the {facts['part']} only")
    for module in facts.get("requires", []):
        print(f"a process that loads the file must first run: import {module}")
    print(f"written to {path}")
