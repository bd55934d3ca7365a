"""A launch as data: the properties that its code depends on, and repeated starts by a plan."""

import pytest
import torch
from carafepp.kernels.geometry import Spec

triton = pytest.importorskip("triton")

from carafepp.kernels.gpu import launch as launching  # noqa: E402
from carafepp.kernels.gpu.launch import Launch, Plan  # noqa: E402
from carafepp.kernels.gpu.tile_geometry import DIRECTIONS  # noqa: E402
from carafepp.kernels.gpu.tile_ranking import choose_tile  # noqa: E402
from carafepp.kernels.gpu.training_step import build_training_step  # noqa: E402

SPECS = (Spec(5, up=2), Spec(5, up=2, groups=2), Spec(3, up=12))
FORMATS = (torch.contiguous_format, torch.channels_last)


def launches(c, h, w, spec, memory_format=torch.contiguous_format, device="meta") -> list[Launch]:
    """The launches of a training step, with the tiles that are chosen for maps of 24 x 20."""
    first, step = (build_training_step(1, c, *size, spec, torch.float16, memory_format, device) for size in ((24, 20), (h, w)))
    tiles = {direction: choose_tile(direction, first.problem()) for direction in DIRECTIONS}
    return [launch for direction, tile in tiles.items() for launch in step.build_launches(direction, tile=tile)]


def code(*arguments) -> list[str]:
    return [launch.source().hash() for launch in launches(*arguments)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_maps_of_any_size_share_their_code(spec, memory_format):
    # rows of all of them are multiples of a vector; some sizes are multiples of 16, and one is 1
    assert code(32, 24, 20, spec, memory_format) == code(32, 16, 32, spec, memory_format) == code(32, 1, 20, spec, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_code_depends_on_channels_and_groups(memory_format):
    assert code(64, 24, 20, Spec(5, up=2), memory_format)[0] != code(72, 24, 20, Spec(5, up=2), memory_format)[0]
    assert code(64, 24, 20, Spec(5, up=2), memory_format)[0] != code(64, 24, 20, Spec(5, up=2, groups=2), memory_format)[0]


def test_a_stride_of_one_is_compiled_in():
    launch = launches(32, 24, 20, Spec(5, up=2))[0]
    sizes, x, logits, y, lse = launch.arguments.values()
    assert x.stride_w == y.stride_w == logits.stride_w == sizes.groups == 1
    passed = [*sizes[1:], *x[:-1], *logits[:-1], *y[:-1], lse]
    assert all(a is b if isinstance(b, torch.Tensor) else a == b for a, b in zip(launch.parameters(), passed, strict=True))


class Compiled:
    """Code that only notes how it is started."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *values: self.started.append((grid, values))


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_starts_its_kernel_with_the_tensors_of_the_call(spec, monkeypatch):
    compiled, sources = Compiled(), []
    monkeypatch.setattr(launching, "compile_for_current_device", lambda launch: sources.append(launch.source().hash()) or compiled)

    def tensors_of(launch):
        return tuple(t for t in launch.parameters() if isinstance(t, torch.Tensor))

    def shifted(tensor, offset):
        return torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)[offset:].as_strided(tensor.shape, tensor.stride())

    for launch in launches(32, 24, 20, spec, device="cpu"):
        sources.clear()
        first = tensors_of(launch)
        plan = Plan(launch, first)
        for offset in (0, 1, 0, 1):
            given = tuple(shifted(t, offset) for t in first)
            plan.run(given)
            grid, values = compiled.started[-1]
            assert grid == launch.grid
            addresses = iter(t.data_ptr() for t in given)
            expected = [
                next(addresses) if isinstance(a, torch.Tensor) else (next(addresses), *a[1:]) if isinstance(a[0], torch.Tensor) else a
                for a in launch.arguments.values()
            ]
            assert values == (*expected, *launch.constants.values())
        # one code for tensors at multiples of 16 bytes, another one elsewhere
        assert len(sources) == len(set(sources)) == 2
