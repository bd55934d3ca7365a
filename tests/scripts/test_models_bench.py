"""carafepp-bench models: figures that can be computed by hand."""

import csv

import pytest
import torch
from carafepp.scripts.benching.models import MODES, measure_networks
from carafepp.scripts.benching.networks import Graphed, build_network, record_sites, replace_parts
from carafepp.tasks.fixed_load import place_objects
from commands import call
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_module("carafepp.conf", version_base="1.3"):
        yield


def rows(*overrides: str) -> dict[str, dict]:
    found = measure_networks(compose("bench_models", overrides=["overrides=['scale=small']", "rounds=1", *overrides]))
    return {row["row"]: row for row in found}


def test_carafe_in_a_detector_adds_its_own_parameters_and_flops():
    found = rows("table=table4", "rows=[carafe]", "size=[96,96]")
    assert list(found) == ["nearest", "carafe"]
    baseline, carafe = found.values()
    # compressor and encoder with biases, on three levels of 32 channels
    assert carafe["parameters"] - baseline["parameters"] == 3 * (33 * 64 + (64 * 9 + 1) * 100)
    # 2 FLOPs for a multiply-add of compressor, encoder and reassembly, for each source pixel of 12 x 12, 6 x 6 and 3 x 3
    assert carafe["flops"] - baseline["flops"] == 2 * (32 * 64 + 64 * 9 * 100 + 100 * 32) * (144 + 36 + 9)
    assert baseline["inference_relative"] == 1
    # of a single round
    assert carafe["inference_relative"] == pytest.approx(carafe["inference_ms"] / baseline["inference_ms"])
    assert carafe["inference_relative_low"] == carafe["inference_relative"] == carafe["inference_relative_high"]
    assert carafe["inference_fps"] == pytest.approx(1000 / carafe["inference_ms"])
    assert (carafe["paper_fps"], carafe["paper_relative"]) == (12.2, pytest.approx(12.5 / 12.2))
    assert baseline["inference_operator_share"] == baseline["inference_rest_share"] == 0
    assert 0 < carafe["inference_operator_share"] < 1


def test_a_detector_does_not_resize_the_images():
    small, large = (rows("table=table4", "rows=[nearest]", f"size=[{size}]", "rounds=0")["nearest"] for size in ("64,96", "128,192"))
    # of a network with a pyramid of 32 channels, 4 times as many pixels take 4 times as much, except in its last level, which
    # is rounded up; the heads of 50 boxes take the same
    heads = 2 * 50 * (32 * 49 * 128 + 128 * 128 + 128 * (11 + 44))
    assert (large["flops"] - heads) / (small["flops"] - heads) == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(("table", "row", "size"), [("table2", "resnet50_carafe", 64), ("table8", "upernet_resnet50_carafe", 64)])
def test_other_tasks_are_measured_alike(table, row, size):
    found = rows(f"table={table}", f"rows=[{row}]", f"size=[{size},{size}]", "rounds=0")
    baseline = row.removesuffix("_carafe")
    assert set(found) == {baseline, row}
    for name in ("parameters", "flops"):
        assert found[row][name] > found[baseline][name]
    assert not any(name.startswith(("inference", "step")) for name in found[row])


@pytest.mark.parametrize(
    ("table", "row", "size"),
    [
        ("table2", "resnet50_carafe", 32),
        ("table7", "fpn_mask_head_backbone", 64),
        ("table9", "backbone", 64),
        ("table10", "global_local_carafe", 64),
    ],
)
def test_a_training_step_is_measured_in_every_task(table, row, size):
    figures = rows(f"table={table}", f"rows=[{row}]", f"size=[{size},{size}]", "modes=[step]", "dtype=bfloat16")[row]
    assert figures["step_fps"] == pytest.approx(2000 / figures["step_ms"])
    assert figures["step_peak_mb"] > figures["parameters"] * 4 / 1e6
    assert 0 < figures["step_operator_share"] < 1
    assert figures["step_rest_share"] > 0


def test_proposals_and_detections_do_not_depend_on_weights():
    found = []
    for row in ("published", "fpn_mask_head_backbone"):
        task = build_network("table7", row, ["scale=small"])
        images = torch.rand(2, 3, 96, 96)
        proposals = []
        task.model.rpn.register_forward_hook(lambda module, arguments, output, kept=proposals: kept.extend(output[0]))
        with torch.no_grad():
            detections = task(images)
        assert [len(each["scores"]) for each in detections] == [20, 20]  # the configuration's limit
        boxes = [each[name] for each in detections for name in ("boxes", "labels", "scores")]
        losses = task.train()(list(images), place_objects(images))
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in task.model.rpn.head.parameters())
        assert task.model.rpn.head.bbox_pred.weight.grad.abs().sum() > 0
        found.append((boxes, proposals))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("table", "row", "wrapped"),
    [
        ("table2", "resnet50", ["ResNet"]),
        ("table7", "published", ["Pyramid", "TwoMLPHead", "MaskRCNNHeads", "MaskRCNNPredictor"]),
    ],
)
def test_static_parts_are_compiled_and_captured(table, row, wrapped):
    task = build_network(table, row, ["scale=small"])
    names = []

    class Wrapper(torch.nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part
            names.append(type(part).__name__)

        def forward(self, *arguments):
            names.append("called")
            return self.part(*arguments)

    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected, actual = task(images), replace_parts(task, Wrapper)(images)
    assert [name for name in names if name != "called"] == wrapped
    assert names.count("called") == len(wrapped)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("table", "row"), [("table2", "resnet50_carafe"), ("table7", "fpn_mask_head_backbone")])
def test_gpu_runs_every_mode(table, row):
    options = ["size=[64,64]", "modes=[inference,step,compiled,graph]", "device=cuda", "dtype=bfloat16", "channels_last=true"]
    figures = rows(f"table={table}", f"rows=[{row}]", *options)[row]
    for mode in MODES:
        assert figures[f"{mode}_ms"] > 0
    assert figures["step_peak_mb"] > 0
    assert 0 < figures["step_operator_share"] < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("table", "row"), [("table2", "resnet50_carafe"), ("table7", "fpn_mask_head_backbone")])
def test_gpu_graph_gives_the_results_of_the_network(table, row):
    task = build_network(table, row, ["scale=small"]).cuda()
    captured = replace_parts(task, Graphed)
    for seed in (0, 1):
        images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(captured(images), task(images))


def test_sites_are_those_of_the_network():
    task = build_network("table4", "carafe", ["scale=small"])
    with torch.no_grad():
        sites = record_sites(task, lambda: task(torch.rand(1, 3, 96, 96)))
    assert [tuple(shape) for _, shape in sites] == [(1, 32, 3, 3), (1, 32, 6, 6), (1, 32, 12, 12)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("table=table15", "table must be among table1, table2.*'table15'"),
        ("modes=[infer]", "modes must be among inference, step, compiled, graph, got 'infer'"),
        ("modes=[graph]", r"modes=\[graph\] needs a GPU, device=cuda, got device=cpu"),
        ("clock=sun", "clock must be among wall, processor, kernels, got 'sun'"),
        ("rows=[caraffe]", "rows must be among nearest, .*carafe, got 'caraffe'"),
    ],
)
def test_unknown_names_are_answered_with_the_known(override, message):
    with pytest.raises(ValueError, match=message):
        rows(override)


def test_command_writes_its_table(tmp_path, capsys):
    GlobalHydra.instance().clear()
    options = ["table=table3", "rows=[max_pool]", "overrides=['scale=small']", "size=[96,96]", "rounds=1", f"hydra.run.dir={tmp_path}"]
    call("bench", "models", *options)
    assert "max_pool" in capsys.readouterr().out
    with (tmp_path / "models.csv").open() as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["conv", "max_pool"]
