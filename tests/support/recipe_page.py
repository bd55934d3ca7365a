"""The recipes of docs/recipes.md: their blocks of code, what is checked of their networks, and the row of each in the table of the page.

`python tests/support/recipe_page.py` writes the table.
"""

import io
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from carafepp.integrations.observing import call_with
from carafepp.integrations.report import Report
from operator_cases import relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PAGE = Path(__file__).parent.parent.parent / "docs" / "recipes.md"
MARKERS = "<!-- networks -->\n", "<!-- /networks -->"
HEAD = ("recipe", "package", "replaced", "left", "K parameters", "MFLOPs", "torch.fx", "ONNX")
# by the first word of a title
PACKAGES = {
    "A": "torch",
    "Lightning": "lightning",
    "torchvision's": "torchvision",
    "timm's": "timm",
    "segmentation_models_pytorch's": "segmentation-models-pytorch",
    "mmcv's": "mmcv-lite",
    "ultralytics'": "ultralytics",
    "transformers'": "transformers",
}
# no package may download anything, or write outside of a folder that is given as YOLO_CONFIG_DIR
OFFLINE = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


@dataclass(frozen=True)
class Recipe:
    """A section of the page: its title and its block of code."""

    title: str
    code: str

    @property
    def package(self) -> str:
        """The package of the network, with its version."""
        name = PACKAGES[self.title.split()[0]]
        return f"{name} {metadata.version(name).split('+')[0]}"

    @property
    def modules(self) -> set[str]:
        """The top-level modules that the block imports."""
        lines = re.findall(r"^(?:from (\w+)\S* import|import (.*))", self.code, re.MULTILINE)
        return {name.split()[0].split(".")[0] for one, several in lines for name in (one or several).split(", ")}

    def run(self, seed: int = 0) -> dict[str, Any]:
        """Run the block and return its names; `network` is one of them, and `report`, if it replaces."""
        torch.manual_seed(seed)
        names: dict[str, Any] = {"__name__": "recipe"}
        exec(compile(self.code, f"{PAGE.name}, {self.title}", "exec"), names)
        if "report" in names:
            names["network"] = names["report"].model
        return names


def read_recipes() -> list[Recipe]:
    """Read the recipes of the page."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = ((section.split("\n", 1)[0], re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)) for section in sections)
    return [Recipe(title, block[1]) for title, block in found if block]


def check_recipe(recipe: Recipe) -> tuple[str, ...] | None:
    """Check all that the page says of a recipe; return the row of its network in the table, if it replaces."""
    names, other = recipe.run(), recipe.run(seed=1)
    network, second, example = names["network"], other["network"], names["example"]
    check_training(network, example)
    check_state(network, second, example)
    report: Report | None = names.get("report")
    if report is None:
        return None
    original = other["report"].undo()
    assert not [module for module in original.modules() if type(module).__module__.startswith("carafepp")]
    network.eval()
    original.eval()
    traces, exports = check_trace(network, original, example), check_export(network, original, example)
    parameters, flops = zip(*(measure(module, example) for module in (original, network)), strict=True)
    added, more = zip(*costs_of(report), strict=True)
    assert parameters[1] - parameters[0] == added[1] - added[0]
    if isinstance(example, list):
        # a detector computes for as many boxes as it finds, which depends on its weights
        flops = more
    assert flops[1] - flops[0] == more[1] - more[0]
    left = Counter(re.split("[;,:]", place.reason)[0] for place in report.left)
    return (
        recipe.title,
        recipe.package,
        str(len(report.replaced)),
        "; ".join(f"{count}: {reason}" for reason, count in left.items()) or "none",
        " → ".join(f"{count / 1e3:,.1f}" for count in parameters),
        " → ".join(f"{count / 1e6:,.1f}" for count in flops),
        traces,
        exports,
    )


def leaves(y: Any) -> list[Tensor]:
    """List the floating-point tensors in an output."""
    if not isinstance(y, Mapping | list | tuple | Tensor):
        y = vars(y)
    return [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def evaluate(network: nn.Module, example: Any) -> list[Tensor]:
    """Run a network in evaluation mode with the same random numbers every time."""
    torch.manual_seed(0)
    # that of mmcv's ResNet returns None
    network.eval()
    with torch.no_grad():
        return leaves(call_with(network, example))


def check_training(network: nn.Module, example: Any) -> None:
    """Check that one step of training gives every sampler a gradient."""
    network.train()
    if isinstance(example, list):
        # a detector
        size = example[0].shape[-1]
        box = torch.tensor([[4.0, 4, size - 4, size - 4]])
        target = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.ones(1, size, size, dtype=torch.uint8)}
        outputs = network(example, [target] * len(example))
    else:
        outputs = call_with(network, example)
    sum(y.square().mean() for y in leaves(outputs) if y.requires_grad).backward()
    samplers = {name: p for name, p in network.named_parameters() if "content_encoder.weight" in name}
    assert samplers
    assert [name for name, p in samplers.items() if p.grad is None or not p.grad.isfinite().all()] == []
    network.zero_grad()


def check_state(network: nn.Module, second: nn.Module, example: Any) -> None:
    """Check that a second network with other weights gives the same results when it has the state dict of the first."""
    expected = evaluate(network, example)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for actual, y in zip(evaluate(second, example), expected, strict=True):
        torch.testing.assert_close(actual, y)


def check_trace(network: nn.Module, original: nn.Module, example: Any) -> str:
    """Trace with torch.fx, and say whether it works. It must if it works with the original."""
    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception as error:
        # torch.fx fails in as many ways as there are forwards
        try:
            torch.fx.symbolic_trace(original)
        except Exception:
            return "no, as the original"
        raise AssertionError("torch.fx traces only the original") from error
    for actual, y in zip(evaluate(traced, example), evaluate(network, example), strict=True):
        torch.testing.assert_close(actual, y)
    return "yes"


def check_export(network: nn.Module, original: nn.Module, example: Any) -> str:
    """Export to ONNX, compare in onnxruntime, and say which exporter works. One must if it works with the original."""
    # the exporter that starts from torch.export takes no detector of torchvision, and prints its program when it fails
    for dynamo, name in ((True, "yes"), (False, "older exporter"))[isinstance(example, list) :]:
        try:
            file = export(network, example, dynamo)
        except Exception as error:
            try:
                export(original, example, dynamo)
            except Exception:
                continue
            raise AssertionError(f"only the original exports with {dynamo=}") from error
        compare_in_onnxruntime(file, network, example)
        return name
    return "no, as the original"


def export(network: nn.Module, example: Any, dynamo: bool) -> bytes:
    """Return the ONNX file of a network."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # the older exporter is deprecated, and warns of every condition on a size
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (example,), None if dynamo else file, dynamo=dynamo, verbose=False)
    return program.model_proto.SerializeToString() if dynamo else file.getvalue()


def compare_in_onnxruntime(file: bytes, network: nn.Module, example: Any) -> None:
    """Compare an ONNX file with its network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # the older exporter writes wrong shapes of outputs whose number depends on the input, which would be a warning for each
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), leaves([example]), strict=True)}
    actual = [torch.from_numpy(y) for y in session.run(None, feed)]
    expected = evaluate(network, example)
    for y, result in zip([y for y in actual if y.is_floating_point()], expected, strict=True):
        assert relative_error(y, result.double()) <= 1e-4


def measure(network: nn.Module, example: Any) -> tuple[int, int]:
    """Return the number of parameters and the FLOPs of a network."""
    with FlopCounterMode(display=False) as counter:
        evaluate(network, example)
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops()


def costs_of(report: Report) -> list[tuple[int, int]]:
    """Return the parameters and FLOPs of the replaced places, before and after."""
    rows = report.replaced
    before = sum(row.parameters_before for row in rows), sum(row.flops_before or 0 for row in rows)
    return [before, (sum(row.parameters_after for row in rows), sum(row.flops_after or 0 for row in rows))]


def format_row(cells: tuple[str, ...]) -> str:
    """Write a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def read_rows() -> dict[str, str]:
    """Read the rows of the table of the page, by their recipes."""
    table = PAGE.read_text().split(MARKERS[0])[1].split(MARKERS[1])[0]
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}


def write_table() -> None:
    """Check all recipes and write the table into the page."""
    rows = [row for recipe in read_recipes() if (row := check_recipe(recipe)) is not None]
    table = "".join(format_row(row) + "\n" for row in [HEAD, ("---",) * len(HEAD), *rows])
    before, rest = PAGE.read_text().split(MARKERS[0])
    PAGE.write_text(before + MARKERS[0] + table + MARKERS[1] + rest.split(MARKERS[1])[1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(OFFLINE, YOLO_CONFIG_DIR=folder)
        os.chdir(folder)
        write_table()
