"""carafepp-bench samplers: figures that can be computed by hand."""

import csv

import pytest
import torch
from carafepp.models.samplers import Nearest
from carafepp.scripts.benching import samplers as bench_samplers
from carafepp.scripts.benching.memory import PeakMemory
from carafepp.scripts.benching.samplers import count_flops_per_pixel, load_slots
from commands import call
from omegaconf import OmegaConf


def test_flops_of_carafe_are_the_published_ones():
    """199 K per source pixel at C = 256: compressor, encoder and reassembly without biases, 2 for a multiply-add."""
    assert 4 * count_flops_per_pixel(load_slots("upsampler")["carafe"], (1, 256, 6, 5)) == 2 * (256 * 64 + 64 * 9 * 100 + 100 * 256)


def test_flops_of_the_rivals_are_those_of_the_table():
    """FLOPs per source pixel, rounded as in Table 2 of the CARAFE paper."""
    for name, millions in {
        "nearest_conv": 4.7,
        "deconv": 1.2,
        "pixel_shuffle": 4.7,
        "gum": 1.1,
        "bilinear": 0.008,
        "spatial_attention": 0.028,
    }.items():
        flops = 4 * count_flops_per_pixel(load_slots("upsampler")[name], (1, 256, 6, 5)) / 1e6
        assert flops == pytest.approx(millions, abs=0.05 if millions > 1 else 0.0005), name


def test_flops_of_pools_are_their_windows():
    assert count_flops_per_pixel(load_slots("downsampler")["avg_pool"], (1, 8, 6, 6)) == 8 * 9
    # a difference, an exponential and a product for each pixel of a block, then two pools and a quotient; index arithmetic counts too
    soft_pool = count_flops_per_pixel(load_slots("downsampler")["soft_pool"], (1, 8, 6, 6))
    assert soft_pool == pytest.approx(8 * (4 * 3 + 4 + 4 + 1), rel=0.02)


def test_flops_of_fourier_transforms_are_those_of_radix_2():
    # of 8 x 8 values, 4 for each pixel of the output, and back of 4 x 4
    assert count_flops_per_pixel(load_slots("downsampler")["flc_pool"], (1, 3, 8, 8)) == 3 * (4 * 5 * 6 + 5 * 4)


def test_peak_memory_counts_what_is_alive_together():
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with PeakMemory() as memory:
        y = Nearest(4)(x)
        y.backward(torch.ones_like(y))
    # the output, its gradient, and the gradient of the input
    assert memory.peak == 4 * (4 * 16 * 16 * 2 + 4 * 8 * 8)
    with PeakMemory() as memory, torch.no_grad():
        for _ in range(3):
            Nearest(4)(x)
    assert memory.peak == 4 * 4 * 16 * 16


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.setattr(bench_samplers, "SITES", {"upsampler": [(256, 3, 4)], "downsampler": [(8, 5, 5)]})
    options = {"groups": ["upsampler", "downsampler"], "names": ["carafe", "gum"], "batch": 1, "dtype": "float32"}
    return OmegaConf.create({**options, "channels_last": True, "device": "cpu", "clock": "processor", "rounds": 2, "seconds": 0.1})


def test_tables(cfg, capsys):
    rows = bench_samplers.measure_samplers(cfg)
    assert [row["sampler"] for row in rows if row["group"] == "upsampler"] == ["nearest", "carafe", "gum"]
    assert [row["sampler"] for row in rows if row["group"] == "downsampler"] == ["strided_conv", "carafe"]
    assert [row["forward_relative"] for row in rows if row["sampler"] in ("nearest", "strided_conv")] == [1, 1]
    assert [row["guided"] for row in rows if row["group"] == "upsampler"] == [False, False, True]
    assert all(row["step_ms"] > 0 and row["peak_mb"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "upsamplers at C = 256, 3 x 4" in printed
    line = next(line for line in printed.splitlines() if line.startswith("carafe"))
    assert line.split()[1:3] == ["74,148", "74,148"]


def test_command_leaves_its_rows_in_the_run_folder(cfg, tmp_path):
    arguments = ["groups=[downsampler]", "names=[max_pool]", "rounds=1", "seconds=0.01", f"hydra.run.dir={tmp_path}"]
    call("bench", "samplers", *arguments)
    with (tmp_path / "samplers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["parameters"]) for row in rows] == [("strided_conv", "584"), ("max_pool", "0")]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("names", r"names must be among a2u, .*carafe.*got 'karafe'"),
        ("groups", "groups must be among upsampler, downsampler, got 'karafe'"),
        ("clock", "clock must be among wall, processor, kernels, got 'karafe'"),
    ],
)
def test_unknown_name_is_answered_with_the_known_ones(cfg, key, message):
    cfg[key] = "karafe" if key == "clock" else ["karafe"]
    with pytest.raises(ValueError, match=message):
        bench_samplers.measure_samplers(cfg)
