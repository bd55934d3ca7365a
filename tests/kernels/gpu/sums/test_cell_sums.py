"""The gradient to float32 features in channels_last of down 2 as a sum over targets: right results, emulated, and where it is taken."""

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.sums import cell_sums
from carafepp.kernels.gpu.training_step import build_training_step
from operator_cases import TRITON_TOLERANCES
from ptx_step import emulate, training_step

NHWC, NCHW = torch.channels_last, torch.contiguous_format
FLOAT = torch.float32


@pytest.fixture
def always(monkeypatch):
    """Sum for maps of any size."""
    monkeypatch.setattr(cell_sums, "SMALLEST", 0)


def check(step):
    assert all(error < TRITON_TOLERANCES[FLOAT] for error in step.errors.values()), step.errors
    assert "sum_cells" in " ".join(step.backward.stats)


@pytest.mark.parametrize(
    ("size", "spec", "capability"),
    [
        ((1, 64, 19, 22), Spec(5, down=2), 90),
        ((2, 20, 7, 5), Spec(3, down=2), 80),
        ((1, 12, 11, 13), Spec(5, down=2, groups=2, border="renormalize"), 90),
        ((1, 4, 1, 2), Spec(5, down=2), 80),
        ((1, 68, 6, 3), Spec(5, down=2, normalizer="sigmoid_normalized"), 80),
        ((1, 5, 9, 16), Spec(3, down=2, normalizer="none"), 90),
        ((1, 6, 8, 9), Spec(1, down=2, groups=3, normalizer="sigmoid"), 80),
    ],
    ids=str,
)
def test_gradients_match_float64(size, spec, capability, always):
    check(training_step(*size, spec, FLOAT, NHWC, capability=capability))


def test_tensors_may_be_parts_of_others(always):
    """A slice of the channels, whose pixels are not aligned, and logits in NCHW."""

    def place(name, size):
        n, c, h, w = size
        if name in ("dy", "dx"):
            return torch.empty(n, c + 3, h, w).contiguous(memory_format=NHWC)[:, 1:-2]
        return torch.empty(size).contiguous(memory_format=NCHW if "logits" in name else NHWC)

    check(training_step(1, 10, 6, 9, Spec(3, down=2), FLOAT, NHWC, place=place))


@pytest.mark.parametrize(
    ("spec", "dtype", "memory_format", "height", "summed"),
    [
        (Spec(5, down=2), FLOAT, NHWC, 256, True),
        (Spec(3, down=2, groups=64, border="renormalize"), FLOAT, NHWC, 256, True),
        (Spec(5, down=2), FLOAT, NHWC, 250, False),
        (Spec(5, down=2), torch.bfloat16, NHWC, 512, False),
        (Spec(5, down=2), FLOAT, NCHW, 256, False),
        (Spec(5, up=2), FLOAT, NHWC, 256, False),
        (Spec(5, down=3), FLOAT, NHWC, 256, False),
        (Spec(5, down=2, border="shift"), FLOAT, NHWC, 256, False),
        (Spec(7, down=2), FLOAT, NHWC, 256, False),
    ],
    ids=str,
)
def test_where_it_is_taken(spec, dtype, memory_format, height, summed):
    step = build_training_step(4, 256, height, 64, spec, dtype, memory_format, "meta")
    names = [launch.kernel.__name__ for launch in step.build_launches("backward", capability=(9, 0))]
    assert ("sum_cells" in names) == summed


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_kernel_does_not_spill(kernel_size, capability):
    step = build_training_step(64, 64, 112, 112, Spec(kernel_size, down=2), FLOAT, NHWC, "meta")
    (launch,) = step.build_launches("source_gradient", capability=divmod(capability, 10))
    assembly = read_assembly(compile_launch(launch, capability))
    assert not assembly.spills
    assert assembly.registers <= 128


def test_a_program_reads_the_targets_around_its_cells_once(always):
    step = build_training_step(1, 64, 32, 64, Spec(5, down=2), FLOAT, NHWC, "cpu")
    (launch,) = step.build_launches("source_gradient", capability=(9, 0))
    tensors = [value for value in launch.parameters() if isinstance(value, torch.Tensor)]
    counts = list(emulate(launch, 90)["per_buffer"].values())[[tensor is step.y for tensor in tensors].index(True)]
    # 4 x 8 cells, and those around them that are in the map
    assert 32 * counts["l2_sectors"] / (step.y.numel() * 4) == 22 / 16 * 38 / 32
