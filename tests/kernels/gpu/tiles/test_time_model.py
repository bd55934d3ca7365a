"""The model of time against the kernels that were measured on an H200, each site predicted by a fit to the others."""

import json

import numpy as np
import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tiles.resources import Resources
from carafepp.kernels.gpu.tiles.time_model import (
    COSTS,
    LAUNCH,
    Costs,
    combine,
    copy_microseconds,
    count_resident,
    estimate_time,
    find_device,
)
from carafepp.kernels.gpu.tiles.work import Work, count_work

pytest.importorskip("scipy")

from fit_tile_time import DATA, PRIOR, Fit, count_new, estimate_of, predict_unseen, rate, read_kernels

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (9, 0))
TILE = Tile(2, 8, 2, 64, 1, 4, 2)


@pytest.fixture(scope="module")
def data():
    return Fit(read_kernels())


def test_the_costs_are_those_of_the_fit_to_all_kernels(data):
    costs = data.fit(np.ones(len(data.kernels), bool), PRIOR)
    assert costs == pytest.approx(COSTS, rel=0.02)


def test_counts_are_added_to_kernels_without_and_kept_in_the_others(tmp_path, monkeypatch):
    data = json.loads(DATA.read_text())
    site, kernels = "fpn_P4 float16 nchw", [kernel for kernel in data["kernels"] if kernel[0] == "fpn_P4 float16 nchw"][:2]
    kernels[0][-1] = [[1.0] * len(Work._fields)]
    kernels[1].pop()
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"problems": {site: data["problems"][site]}, "kernels": kernels}))
    monkeypatch.setattr("fit_tile_time.DATA", path)
    count_new()
    kept, counted = read_kernels()
    assert kept.works()[0] == Work(*[1.0] * len(Work._fields))
    assert counted.works()[1:] == [pytest.approx(work, rel=1e-5) for work in count_work("backward", counted.problem, counted.tile)]


def test_unseen_sites_are_predicted(data):
    predicted = predict_unseen(data)
    errors = np.abs(predicted / data.microseconds - 1)
    # docs/performance_kernels.md has these figures
    assert np.median(errors) < 0.11
    assert np.mean(errors < 0.2) > 0.78
    found = rate(data, predicted, least=20).values()
    assert len(found) == 20
    assert np.mean([quality.rank_correlation for quality in found]) > 0.93
    assert min(quality.rank_correlation for quality in found) > 0.84
    assert min(quality.within for quality in found) > 0.5
    assert np.mean([quality.chosen for quality in found]) < 1.05
    assert max(quality.chosen for quality in found) < 1.2


def test_programs_run_in_waves():
    # one kind of program: 100 cycles alone, 10 cycles of the units
    costs = COSTS._replace(**dict.fromkeys(Costs._fields, 0.0) | {"line": 10, "step": 90})

    def time(programs):
        work = Work(*[0.0] * len(Work._fields))._replace(programs=programs, warps=1, steps=1, lines=1)
        total = combine(costs, (work,), stages=1, products=1, resident=2, multiprocessors=4, clock=1e-3, copy=0).total
        return total - LAUNCH

    one, two = ((100**1.5 + (n * 10) ** 1.5) ** (1 / 1.5) for n in (1, 2))
    assert [time(n) for n in (1, 4, 5, 8, 9, 12, 16)] == pytest.approx([one, one, two, two, two + one, two + one, 2 * two])


def test_registers_and_shared_memory_are_estimated(data):
    kernels = [kernel for kernel in data.kernels if kernel.spills == 0]
    registers = [estimate_of(kernel).registers / kernel.registers for kernel in kernels]
    assert np.median(registers) == pytest.approx(1, abs=0.05)
    assert np.median(np.abs(np.log(registers))) < 0.1
    # in float32, versions of Triton differ in the operands that they keep in shared memory
    for element_size, exact in ((2, 0.8), (4, 0.45)):
        these = [kernel for kernel in kernels if kernel.shared and kernel.problem.element_size == element_size]
        assert np.mean([abs(np.log(estimate_of(kernel).shared / kernel.shared)) < 0.05 for kernel in these]) > exact


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_programs_at_a_time_take_less_time(kernel):
    times = [estimate_time(kernel, PROBLEM._replace(batch=64), TILE, Resources(n, 16384)).total for n in (64, 128, 255)]
    assert times == sorted(times)
    assert times[0] < times[-1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", [{"channels": 512}, {"height": 50}, {"batch": 2}, {"element_size": 4}, {"spec": Spec(7, up=2)}])
def test_more_work_takes_more_time(kernel, change):
    tile = Tile(2, 4, 2, 64, 1, 4, 1)
    assert estimate_time(kernel, PROBLEM._replace(**change), tile).total > estimate_time(kernel, PROBLEM, tile).total


def test_a_copy_moves_every_tensor_once():
    x, y, logits = 256 * 25 * 42 * 2, 256 * 50 * 84 * 2, 25 * 50 * 84 * 2
    speed = find_device((9, 0)).copy * 1e6
    assert copy_microseconds(PROBLEM, "forward") == pytest.approx((x + y + logits) / speed)
    assert copy_microseconds(PROBLEM, "backward") == pytest.approx((2 * x + y + 2 * logits) / speed)
    assert copy_microseconds(PROBLEM, "source_gradient") == pytest.approx((x + y + logits) / speed)


def test_devices_that_are_not_listed_count_as_the_nearest_below():
    counts = [find_device(capability).multiprocessors for capability in ((6, 1), (7, 0), (7, 5), (8, 7), (9, 0), (12, 0))]
    assert counts == [80, 80, 80, 84, 132, 148]
    # 128 registers leave room for 16 warps
    assert [count_resident(capability, 128, 0, 4) for capability in ((7, 5), (8, 0), (9, 0))] == [4, 4, 4]
    assert count_resident((12, 0), 128, 60_000, 4) == 1
