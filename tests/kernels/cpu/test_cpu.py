"""The CPU kernel and the PyTorch code that runs without a compiler, against the definition in float64."""

import ctypes
import hashlib
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_reference, registration
from carafepp.kernels.cpu import backend as cpu
from carafepp.kernels.cpu import build as cpu_build
from carafepp.kernels.geometry import NORMALIZERS
from hypothesis import given, settings
from hypothesis import strategies as st

# of the largest value: half precision rounds the result once, the sums have up to 2,000 terms
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, cpu_build.COMPILERS)), reason="no C++ compiler")
BOTH = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NEEDS_COMPILER), "torch"])


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Every output starts as NaN, so that a value left out is seen; threads are put back."""
    threads = torch.get_num_threads()

    def poison(outputs):
        return lambda *args: tuple(t.fill_(float("nan")) for t in outputs(*args))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty_outputs", "empty_gradients"):
            patch.setattr(registration, name, poison(getattr(registration, name)))
        yield
    torch.set_num_threads(threads)


def arrange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return tensor.repeat_interleave(2, dim=3)[..., 1::2]
    if layout == "expanded":
        return tensor[:1, :1, :1, :1].expand(tensor.shape)
    return tensor


@st.composite
def problems(draw, sizes=st.tuples(st.integers(1, 13), st.integers(1, 19)), channels=(1, 2, 3, 5, 16, 17, 33)):  # noqa: B008
    up, down = draw(st.sampled_from([(1, 1), (2, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (3, 2), (2, 3), (5, 2)]))
    groups = draw(st.integers(1, 3))
    kernel_size = draw(st.sampled_from([1, 3, 5, 7]))
    total = groups * draw(st.sampled_from(channels))
    return dict(
        shape=(draw(st.integers(1, 2)), total, *draw(sizes)),
        options=dict(kernel_size=kernel_size, up=up, down=down, groups=groups, normalizer=draw(st.sampled_from(NORMALIZERS))),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        layouts=draw(st.tuples(*(st.sampled_from(LAYOUTS) for _ in range(3)))),
        threads=draw(st.sampled_from([1, 2, 3, 7])),
        seed=draw(st.integers(0, 2**16)),
    )


def make_inputs(shape, options, dtype, layouts, seed):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    k, up, down, groups = (options[name] for name in ("kernel_size", "up", "down", "groups"))
    x = torch.randn(shape, generator=generator)
    logits = 2 * torch.randn(n, groups * k * k * up * up, -(-h // down), -(-w // down), generator=generator)
    dy = torch.randn(n, c, -(-h * up // down), -(-w * up // down), generator=generator)
    return tuple(arrange(t.to(dtype), layout) for t, layout in zip((x, logits, dy), layouts, strict=True))


def results(function, x, logits, dy, **options):
    """(y, dx, dlogits)"""
    x, logits = (t.detach().requires_grad_() for t in (x, logits))
    y = function(x, logits, **options)
    return y.detach(), *torch.autograd.grad(y, (x, logits), dy)


def assert_matches_reference(shape, options, dtype, layouts, threads, seed, backend="cpu"):
    torch.set_num_threads(1)
    inputs = make_inputs(shape, options, dtype, layouts, seed)
    expected = results(reassemble_reference, *(t.double() for t in inputs), **options)
    torch.set_num_threads(threads)
    actual = results(reassemble, *inputs, backend=backend, **options)
    for name, a, e in zip(("y", "dx", "dlogits"), actual, expected, strict=True):
        assert a.dtype == dtype
        # dlogits are differences of sums over the channels
        scale = e.abs().max().item() + (shape[1] / options["groups"]) ** 0.5
        error = (a.double() - e).abs().max().item()
        assert error <= TOLERANCE[dtype] * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


@NEEDS_COMPILER
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(problems())
def test_kernel_matches_the_reference(problem):
    assert_matches_reference(**problem)


@NEEDS_COMPILER
@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(sizes=st.tuples(st.integers(1, 3), st.integers(20, 310)), channels=(1, 2)))
def test_kernel_matches_the_reference_on_maps_of_many_tiles(problem):
    assert_matches_reference(**problem)


@pytest.fixture(scope="module")
def plain_kernel(tmp_path_factory):
    """The kernel for any processor of this architecture: vectors are shorter, other tiles are chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cpu_build, "TUNINGS", ((),))
        return ctypes.CDLL(str(cpu_build.build()))


@NEEDS_COMPILER
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(problems(), problems(sizes=st.tuples(st.integers(1, 3), st.integers(20, 310)), channels=(1, 2))))
def test_kernel_without_the_processors_own_instructions(plain_kernel, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: plain_kernel)
        assert_matches_reference(**problem)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_torch_matches_the_reference(problem):
    assert_matches_reference(**problem, backend="torch")


@NEEDS_COMPILER
def test_extreme_logits():
    """Scores far beyond the range of exp, and windows masked by minus infinity, give what softmax gives."""
    x = torch.randn(1, 16, 4, 5)
    logits = torch.randn(1, 9, 4, 5)
    logits[:, 2] = 300
    logits[:, 3] = -torch.inf
    logits[..., 0] -= 1e4
    for normalizer in ("softmax", "sigmoid", "sigmoid_normalized"):
        options = dict(kernel_size=3, normalizer=normalizer)
        expected = reassemble_reference(x.double(), logits.double(), **options).float()
        torch.testing.assert_close(reassemble(x, logits, backend="cpu", **options), expected, rtol=1e-5, atol=1e-6)
    logits[0, 0, 1, 1] = torch.nan
    wrong = reassemble(x, logits, kernel_size=3, backend="cpu").isnan()
    assert wrong[..., 1, 1].all()
    assert wrong.sum() == wrong[..., 1, 1].sum()


@NEEDS_COMPILER
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 32, 37, 41), dict(kernel_size=5, up=2)),
        ((1, 64, 61, 67), dict(kernel_size=5, down=2)),
        ((1, 48, 23, 31), dict(kernel_size=3, up=3, down=2, groups=3, normalizer="sigmoid_normalized")),
        ((1, 16, 9, 300), dict(kernel_size=7, up=2)),
    ],
)
def test_bit_identical_for_any_number_of_threads(shape, options, layout):
    options = dict(up=1, down=1, groups=1, normalizer="softmax") | options
    inputs = make_inputs(shape, options, torch.float32, (layout,) * 3, seed=0)
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append(results(reassemble, *inputs, backend="cpu", **options))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@NEEDS_COMPILER
def test_own_threads_give_the_same(monkeypatch):
    """Without PyTorch's OpenMP runtime the kernel starts its own threads."""
    torch.set_num_threads(2)
    options = dict(kernel_size=5, up=2, down=1, groups=1, normalizer="softmax")
    inputs = make_inputs((1, 32, 40, 40), options, torch.float32, ("contiguous",) * 3, seed=1)
    expected = results(reassemble, *inputs, backend="cpu", **options)
    monkeypatch.setattr(cpu, "openmp_parallel", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(results(reassemble, *inputs, backend="cpu", **options), expected, strict=True))


@NEEDS_COMPILER
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_forked_workers_do_not_wait_for_threads_of_the_parent():
    torch.set_num_threads(2)
    # work for two threads here, too small to be shared out by PyTorch itself, which does not survive a fork
    x, logits = torch.randn(1, 16, 16, 16), torch.randn(1, 196, 16, 16)

    def digest() -> str:
        return hashlib.sha256(reassemble(x, logits, kernel_size=7, up=2, backend="cpu").numpy().tobytes()).hexdigest()

    expected = digest()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(digest()))
    process.start()
    try:
        assert receiver.poll(60), "the forked process hangs"
        assert receiver.recv() == expected
    finally:
        process.kill()


# build.py by its path, for importing PyTorch costs seconds a process
BUILD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("cpu_build", {cpu_build.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build())
"""


@NEEDS_COMPILER
def test_many_processes_build_once(tmp_path):
    compiler = next(filter(None, map(shutil.which, cpu_build.COMPILERS)))
    log = tmp_path / "log"
    _write_script(tmp_path / "bin" / "c++", f'echo run >> "{log}"\nexec "{compiler}" "$@"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}
    processes = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    (built,) = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 6
    assert log.read_text().splitlines() == ["run"]
    assert ctypes.CDLL(built).carafepp_forward
    # nothing half-built stays
    assert {file.suffix for file in Path(built).parent.iterdir()} <= {".so", ".lock"}


def _write_script(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_build_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(cpu_build.BuildError, match=r"Install g\+\+ or clang\+\+"):
        cpu_build.build()
    _write_script(tmp_path / "bin" / "c++", "echo cannot find 1>&2; exit 1")
    with pytest.raises(cpu_build.BuildError, match=r"(?s)cannot find.*C\+\+17"):
        cpu_build.build()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(cpu_build.BuildError, match="Set XDG_CACHE_HOME"):
        cpu_build.build()


WITHOUT_COMPILER = """
import warnings, torch
from carafepp.kernels import reassemble, reassemble_reference
x, logits = torch.randn(1, 4, 5, 6), torch.randn(1, 100, 5, 6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = reassemble(x, logits, kernel_size=5, up=2)
torch.testing.assert_close(y, reassemble_reference(x, logits, kernel_size=5, up=2))
(warning,) = [w for w in caught if "carafepp" in str(w.message)]
assert "Install g++" in str(warning.message), warning
assert torch.equal(y, reassemble(x, logits, kernel_size=5, up=2, backend="torch"))
try:
    reassemble(x, logits, kernel_size=5, up=2, backend="cpu")
except RuntimeError as error:
    assert "Install g++" in str(error) and "'torch' runs without" in str(error), error
else:
    raise SystemExit("the forced kernel must not be replaced")
"""


def test_works_without_a_compiler_and_warns_once(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, check=True, timeout=300)


@BOTH
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_to_second_order(normalizer, backend):
    torch.set_num_threads(1)
    options = dict(kernel_size=3, up=2, down=1, groups=2, normalizer=normalizer)
    inputs = [t.requires_grad_() for t in make_inputs((1, 4, 3, 2), options, torch.float64, ("contiguous",) * 3, seed=2)[:2]]

    def function(x, logits):
        return reassemble(x, logits, backend=backend, **options)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalizer", ["softmax", "none"])
def test_opcheck(layout, normalizer, backend):
    options = dict(kernel_size=3, up=3, down=2, groups=2, normalizer=normalizer)
    x, logits, dy = make_inputs((2, 32, 5, 4), options, torch.float32, (layout,) * 3, seed=3)
    logits = logits.unflatten(1, (18, 3, 3))
    tail = (3, 3, 2, 2, normalizer, backend)
    torch.library.opcheck(torch.ops.carafepp.reassemble, (x.requires_grad_(), logits.detach().requires_grad_(), *tail))
    lse = torch.ops.carafepp.reassemble(x, logits, *tail)[1].detach()
    torch.library.opcheck(torch.ops.carafepp.reassemble_backward, (dy, x.detach(), logits, lse, *tail, True, True))


class Reassemble(torch.nn.Module):
    def forward(self, x, logits):
        return reassemble(x.relu(), 2 * logits, kernel_size=5, up=2) + 1


def test_compiles_to_one_graph():
    inputs = make_inputs((1, 8, 6, 5), dict(kernel_size=5, up=2, down=1, groups=1), torch.float32, ("channels_last",) * 3, seed=4)
    compiled = torch.compile(Reassemble(), fullgraph=True, backend="aot_eager")
    for a, e in zip(results(compiled, *inputs), results(Reassemble(), *inputs), strict=True):
        torch.testing.assert_close(a, e)


def test_exports_for_any_size():
    height, width = torch.export.Dim("height", min=2, max=99), torch.export.Dim("width", min=2, max=99)
    sizes = {2: height, 3: width}
    exported = torch.export.export(
        Reassemble(), (torch.randn(1, 8, 6, 5), torch.randn(1, 100, 6, 5)), dynamic_shapes={"x": sizes, "logits": sizes}
    )
    for size in ((6, 5), (11, 7)):
        inputs = torch.randn(1, 8, *size), torch.randn(1, 100, *size)
        torch.testing.assert_close(exported.module()(*inputs), Reassemble()(*inputs))
