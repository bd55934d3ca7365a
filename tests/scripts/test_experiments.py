"""Every row of the paper's tables composes and builds, and two rows are equal only where the paper gives them the same figures."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml
from carafepp.models.carafe import CARAFE
from carafepp.scripts.common.paper import list_rows, read_paper
from carafepp.tasks.detection import Detection
from configurations import CONF, compose_config
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

TABLES, METRICS = read_paper()
SETTINGS = yaml.safe_load((Path(__file__).parents[1] / "data" / "paper_settings.yaml").read_text())
PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
ROWS = [f"{table}/{row}" for table in TABLES for row in dict.fromkeys(row["row"] for row in list_rows(TABLES, table))]
# wider published networks, which the paper does not have
CONTROLS = ["table9/same_flops", "table9/same_parameters"]

# class and slots for samplers, by the start of the name of a row
NETWORKS = {
    "resnet50": ("resnet50", ["backbone"]),
    "resnet101": ("resnet101", ["backbone"]),
    "faster_rcnn": ("FasterRCNN", ["fpn", "backbone"]),
    "mask_rcnn": ("MaskRCNN", ["fpn", "mask_head", "backbone"]),
    "pspnet": ("PSPNet", ["ppm", "backbone"]),
    "psanet": ("PSANet", ["backbone"]),
    "upernet": ("UperNet", ["ppm", "fpn", "fuse", "backbone"]),
    "global_local": ("GlobalLocal", ["upsample", "backbone"]),
    "partial_conv": ("PartialGlobalLocal", ["upsample", "backbone"]),
}
# the network of tables whose rows do not name it
CAPTIONED = {"table6": "mask_rcnn", "table7": "mask_rcnn", "table9": "upernet", "table12": "resnet50"}
# the slot of the samplers that the rows compare
COMPARED = {"table3": "backbone", "table4": "fpn", "table6": "mask_head"}
# the slot of the CARAFE++ module that the rows change, and the options whose values are in their names, in this order
ABLATED = {
    "table11": ("fpn", ["compressed_channels"]),
    "table12": ("backbone", ["compressed_channels"]),
    "table13": ("fpn", ["encoder_kernel", "kernel_size"]),
    "table14": ("fpn", ["normalizer"]),
}


def made_of(*overrides: str) -> dict:
    """Compose the task, data and trainer of a run with these overrides."""
    config = compose_config("train", *([*overrides, "data.root=FOLDER"] if "scale=small" not in overrides else list(overrides)))
    return {key: OmegaConf.to_container(config[key], resolve=True) for key in ("task", "data", "trainer")}


class Configs(dict):
    """Rows ("table4/carafe") and experiments without a row ("table4") in the settings of the paper, composed at their first use."""

    def __missing__(self, name: str) -> dict:
        table, _, row = name.partition("/")
        self[name] = made_of(f"experiment={table}", *([f"row={name}"] if row else []))
        return self[name]


@pytest.fixture(scope="module")
def configs():
    return Configs()


def figures(place: str) -> dict[tuple[str, str], float]:
    """Return the accuracy that the paper gives for a row, by task and column."""
    table, row = place.split("/")
    found = [f for f in list_rows(TABLES, table) if f["row"] == row]
    return {(f["task"], column): f[column] for f in found for column in METRICS[f["task"]] if column in f}


def test_there_is_a_file_for_each_of_the_96_rows():
    assert sum(len(table["rows"]) for table in TABLES.values()) == 96
    assert {f"{path.parent.name}/{path.stem}" for path in (CONF / "row").glob("table*/*.yaml")} == {*ROWS, *CONTROLS}
    assert {path.stem for path in (CONF / "experiment").glob("table*.yaml")} == set(TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_builds(configs, table):
    counted = {row: int(count.replace(",", "")) for row, count in re.findall(r"^\| (table\d+/\w+) +\| ([\d,]+) ", PAGE, re.MULTILINE)}
    built = {}
    for row in (row for row in ROWS if row.startswith(f"{table}/")):
        # the meta device makes this cheap
        with torch.device("meta"):
            task = instantiate(OmegaConf.create(configs[row]["task"]))
        built[row] = sum(p.numel() for p in task.model.parameters())
        assert counted[row] == built[row], row
        assert task.monitor in METRICS[next(iter(figures(row)))[0]].values() or task.monitor == "val/box_AP"
    assert min(built.values()) > 1e6


def run_parts(task: Detection) -> None:
    """Run the parts of a detector with 1,000 proposals and 100 masks of an image of 800 x 1333, which is padded to a multiple of 32."""
    model, heads = task.model, task.model.roi_heads
    features = model.backbone(torch.empty(1, 3, 800, 1344))
    channels = model.backbone.out_channels
    model.rpn.head(list(features.values()))
    heads.box_predictor(heads.box_head(torch.empty(1000, channels, 7, 7)))
    if task.has_masks:
        heads.mask_predictor(heads.mask_head(torch.empty(100, channels, 14, 14)))


# a second a row
@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_the_flops_of_the_page(configs, table):
    counted = {row: float(flops) for row, flops in re.findall(r"^\| (table\d+/\w+) +\| [\d,]+ \| ([\d.]+) ", PAGE, re.MULTILINE)}
    for row in (row for row in ROWS if row.startswith(f"{table}/")):
        config = OmegaConf.create(configs[row]["task"])
        # tensors without values; detectors ask for the autocast of their device, and the meta device has none
        without_values = FakeTensorMode() if config._target_.endswith(".Detection") else torch.device("meta")
        with without_values, torch.no_grad(), FlopCounterMode(display=False) as counter:
            task = instantiate(config).eval()
            if isinstance(task, Detection):
                run_parts(task)
            else:
                task(torch.empty(1, 3, *task.bench_size))
        assert counter.get_total_flops() / 1e9 == pytest.approx(counted[row], abs=0.051), row


@pytest.mark.parametrize("table", TABLES)
def test_every_experiment_builds_in_small(table):
    rows = [row for row in ROWS if row.startswith(f"{table}/")]
    small = made_of(f"experiment={table}", f"row={rows[-1]}", "scale=small")
    with torch.device("meta"):
        task = instantiate(OmegaConf.create(small["task"]))
    assert 1e5 < sum(p.numel() for p in task.parameters()) < 2e7


def test_rows_are_the_same_run_where_the_paper_gives_the_same_figures(configs):
    same, expected = set(), set()
    for pair in itertools.combinations(ROWS, 2):
        first, second = map(figures, pair)
        common = first.keys() & second.keys()
        if common and all(first[key] == second[key] for key in common):
            expected.add(pair)
        if configs[pair[0]] == configs[pair[1]]:
            same.add(pair)
    assert ("table4/carafe", "table5/fpn") in expected
    assert same == expected
    # the classifiers that ResNet-50 and ResNet-101 start from have different names at this scale, too
    small = {row: made_of(f"experiment={row.split('/')[0]}", f"row={row}", "scale=small", "pretraining=null") for row in ROWS}
    # the runs of one serve as runs of the other at either scale, except where a table says that it differs
    for first, second in expected:
        differs = any("small" in TABLES[place.split("/")[0]].get("own_scales", []) for place in (first, second))
        assert (small[first] == small[second]) != differs, f"{first} and {second}"
    # at scale=small both ResNets are the same tiny network
    twin = {row: row.replace("resnet101", "resnet50") if row.replace("resnet101", "resnet50") in ROWS else row for row in ROWS}
    for first, second in itertools.combinations(ROWS, 2):
        if first.split("/")[0] == second.split("/")[0]:
            assert (small[first] == small[second]) == (configs[twin[first]] == configs[twin[second]]), f"{first} and {second}"


def compressions(task: torch.nn.Module) -> list[float]:
    """Return the ratio of C_m to the number of channels that are compressed, of every CARAFE++ module."""
    found = [module for module in task.modules() if isinstance(module, CARAFE)]
    return [m.content_encoder.in_channels / getattr(m.channel_compressor, "in_channels", m.content_encoder.in_channels) for m in found]


@pytest.mark.parametrize("table", ["table11", "table12"])
def test_small_ablations_compress_as_the_papers_do(configs, table):
    for row in (row for row in ROWS if row.startswith(f"{table}/")):
        with torch.device("meta"):
            paper = instantiate(OmegaConf.create(configs[row]["task"]))
            small = instantiate(OmegaConf.create(made_of(f"experiment={table}", f"row={row}", "scale=small")["task"]))
        assert compressions(small) == compressions(paper)
        assert 0 < max(compressions(small)) <= 1


def named(place: str) -> dict:
    """Return what the name of a row and the caption of its table say about network, training and CARAFE++ modules."""
    table, row = place.split("/")
    network = next((name for name in NETWORKS if row.startswith(name)), CAPTIONED.get(table, "faster_rcnn"))
    slots = NETWORKS[network][1]
    if table in COMPARED:
        filled = {} if row == TABLES[table]["baseline"] else {COMPARED[table]: row.replace("_", "")}
    elif table in ("table5", "table7", "table9"):
        filled = {slot: "carafe" for slot in slots if slot in row}
    elif table in ABLATED:
        filled = {ABLATED[table][0]: "carafe"}
    else:
        filled = dict.fromkeys(slots if row.endswith("_carafe") else [], "carafe")
    numbers = [None if number == "none" else int(number) for number in re.findall(r"\d+|none", row)]
    changed = dict(zip(ABLATED[table][1], numbers or [row], strict=True)) if table in ABLATED else {}
    usual = {"kernel_size": 5, "encoder_kernel": 3, "normalizer": "softmax", "groups": 1, "encoder_dilation": 1, "border": "zero"}
    # batch normalisation and ReLU in pretrained backbones, section 5.1
    up = usual | {"up": 2, "compressed_channels": 64, "compressor_norm": False} | changed
    down = usual | {"down": 2, "compressed_channels": 16, "compressor_norm": table != "table10"} | changed
    return {
        "network": NETWORKS[network][0],
        "backbone": None if table == "table10" else "resnet101" if "resnet101" in row else "resnet50",
        "deformable": [2, 3, 4] if "dcnv2" in row else [],
        "epochs": {"table1": 24, "table2": 90, "table12": 90, "table8": 79.1766, "table9": 79.1766, "table10": 5}.get(table, 12),
        "samplers": dict.fromkeys(slots, "published") | filled,
        "carafe": {slot: down if slot == "backbone" else up for slot, sampler in filled.items() if sampler == "carafe"},
    }


def composed(config: dict) -> dict:
    """Return the same about a configuration."""
    model = config["task"]["model"]
    # a classifier and the generators of inpainting hold their downsamplers without a backbone
    backbone = model.get("backbone", model)
    slots = {slot: model[slot] for slot in ("ppm", "fpn", "fuse", "mask_head", "upsample") if slot in model}
    slots = {slot: node.get("slot", node) for slot, node in slots.items()} | {"backbone": backbone["downsample"]}
    samplers = {slot: node["_target_"].rpartition(".")[2].lower() for slot, node in slots.items()}
    carafe = {}
    for slot, sampler in samplers.items():
        if sampler == "carafe":
            carafe[slot] = {key: value for key, value in slots[slot].items() if key[0] != "_"}
            if carafe[slot]["compressed_channels"] == "auto":
                carafe[slot]["compressed_channels"] = 64 if "up" in carafe[slot] else 16
    return {
        "network": model["_target_"].rpartition(".")[2],
        "backbone": backbone["_target_"].rpartition(".")[2] if "deformable" in backbone else None,
        "deformable": backbone.get("deformable", []),
        "epochs": config["data"]["epochs"],
        "samplers": samplers,
        "carafe": carafe,
    }


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_what_its_name_says(configs, table):
    rows = [row for row in ROWS if row.startswith(f"{table}/")]
    assert {row: composed(configs[row]) for row in rows} == {row: named(row) for row in rows}


def list_fields(node: object, key: str) -> dict[str, object]:
    """List every field of a configuration by key; the class of a part is the value of the part itself."""
    if isinstance(node, dict):
        if str(node.get("_target_")).endswith(".samplers.shared"):
            return list_fields(node["slot"], key)
        parts = {f"{key}.{name}": child for name, child in node.items() if name not in ("_target_", "_partial_")}
        own = {key: node["_target_"].rpartition(".")[2]} if "_target_" in node else {}
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        own, parts = {}, {f"{key}.{i}": child for i, child in enumerate(node)}
    else:
        return {key: len(node) if isinstance(node, list) and key.endswith("class_names") else node}
    return own | {name: value for part, child in parts.items() for name, value in list_fields(child, part).items()}


def list_settings(row: str) -> dict[str, object]:
    """List the fields of a row that the file of the paper's settings gives."""
    blocks = [SETTINGS["blocks"][block] if isinstance(block, str) else block for block in ["machine", *SETTINGS["rows"][row]]]
    fields: dict[str, object] = {}
    for key, value in (item for block in blocks for item in block.items()):
        if isinstance(value, str) and value in SETTINGS["samplers"]:
            # another sampler in the place of the one before
            fields = {name: kept for name, kept in fields.items() if not name.startswith(f"{key}.")}
            sampler = SETTINGS["samplers"][value]
            fields |= {key if name == "class" else f"{key}.{name}": option for name, option in sampler.items()}
        else:
            fields[key] = value
    return fields


@pytest.mark.parametrize("table", TABLES)
def test_every_field_of_every_row_is_that_of_the_papers_settings(configs, table):
    rows = [row for row in ROWS if row.startswith(f"{table}/")]
    assert [row for row in SETTINGS["rows"] if row.startswith(f"{table}/")] == rows
    for row in rows:
        found = {key: value for part in ("task", "data", "trainer") for key, value in list_fields(configs[row][part], part).items()}
        expected = list_settings(row)
        differ = {key: (found.get(key, "absent"), expected.get(key, "absent")) for key in found.keys() | expected.keys()}
        assert {key: pair for key, pair in differ.items() if pair[0] != pair[1]} == {}, f"{row}: found, expected"


@pytest.mark.parametrize("table", TABLES)
def test_experiment_alone_is_its_baseline(configs, table):
    baseline = TABLES[table]["baseline"]
    rows = [baseline] if isinstance(baseline, str) else list(baseline.values())
    assert any(configs[table] == configs[f"{table}/{row}"] for row in rows)


@pytest.mark.parametrize("table", TABLES)
def test_sweep_runs_the_rows_in_the_papers_order(table):
    rows = [row for row in ROWS if row.startswith(f"{table}/")]
    swept = {}
    for scale in ("paper", "small"):
        config = compose_config("train", f"experiment={table}", f"scale={scale}", with_hydra=True)
        swept[scale] = [row.strip() for row in config.hydra.sweeper.params.row.split(",")]
    assert swept["paper"] == rows
    # at the small scale, both ResNets of Tables II and VIII are the same tiny network
    assert swept["small"] == [row for row in rows if table not in ("table2", "table8") or "resnet101" not in row]
