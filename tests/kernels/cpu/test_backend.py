"""The compiled CPU kernel: at random sizes, without the processor's own instructions, on any number of threads, after a fork."""

import ctypes
import hashlib
import multiprocessing
import threading

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_weights
from carafepp.kernels.cpu import backend as cpu
from carafepp.kernels.cpu import build as cpu_build
from carafepp.kernels.geometry import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import MANY_TILES, assert_call_matches_definition, drawn_calls
from operator_cases import differentiate, random_inputs

pytestmark = pytest.mark.usefixtures("compiler", "poisoned_memory", "threads_restored")


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(drawn_calls())
def test_kernel_matches_the_definition(call):
    assert_call_matches_definition("cpu", call)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn_calls(MANY_TILES, channels=(1, 2)))
def test_kernel_matches_the_definition_on_maps_of_many_tiles(call):
    assert_call_matches_definition("cpu", call)


@pytest.fixture(scope="module")
def plain_kernel():
    """The kernel for any processor of this architecture: vectors are shorter, other tiles are chosen."""
    with pytest.MonkeyPatch.context() as patch:
        # the name of the file in the cache depends on it
        patch.setattr(cpu_build, "TUNINGS", ((),))
        return cpu.load(cpu_build.build())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(drawn_calls(), drawn_calls(MANY_TILES, channels=(1, 2))))
def test_kernel_without_the_processors_own_instructions(plain_kernel, call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: used.append(plain_kernel) or plain_kernel)
        used: list[ctypes.CDLL] = []
        assert_call_matches_definition("cpu", call)
        assert used


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("size", "spec"),
    [
        ((2, 32, 37, 41), Spec(5, up=2)),
        ((1, 64, 61, 67), Spec(5, down=2)),
        ((1, 48, 23, 31), Spec(3, up=3, down=2, groups=3, normalizer="sigmoid_normalized")),
        ((1, 16, 9, 300), Spec(7, up=2)),
        ((1, 32, 37, 41), Spec(5, up=2, border="renormalize")),
        ((1, 32, 37, 41), Spec(5, up=2, border="replicate")),
        ((1, 32, 37, 41), Spec(5, down=2, border="shift")),
    ],
    ids=str,
)
def test_bit_identical_for_any_number_of_threads(size, spec, layout):
    inputs = random_inputs(*size, spec, layouts=layout, spread=2.0)
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append(differentiate(reassemble, *inputs, backend="cpu", **spec._asdict()))
    for run in runs[1:]:
        assert all(torch.equal(run[name], result) for name, result in runs[0].items())


@pytest.mark.parametrize("columns", [5, 16, 39])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(5, up=2),
        Spec(3, up=3, down=2, groups=2, normalizer="sigmoid_normalized"),
        Spec(1, border="replicate"),
        Spec(3, up=4, normalizer="sigmoid"),
        Spec(3, down=2, groups=2, normalizer="none"),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_memory_format_of_the_logits(spec, columns):
    x, logits, dy = random_inputs(2, 34, 7, columns, spec, layouts="channels_last", spread=2.0)
    at_targets = torch.randn(2, spec.groups * spec.taps, *dy.shape[2:])
    for function, weights in ((reassemble, logits), (reassemble_weights, at_targets)):
        contiguous, channels_last = (
            differentiate(function, x, weights.contiguous(memory_format=layout), dy, backend="cpu", **spec._asdict())
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        assert all(torch.equal(channels_last[name], result) for name, result in contiguous.items())


@pytest.mark.parametrize("spec", [Spec(1, up=2), Spec(3, up=3, down=2), Spec(5, up=2)], ids=str)
@pytest.mark.parametrize(("channels", "dtype"), [(84, torch.float32), (96, torch.float32), (96, torch.bfloat16)], ids=str)
def test_bits_do_not_depend_on_the_size_of_the_batch(spec, channels, dtype):
    """The outputs of many images do not fit into the caches: they are prefetched or, in whole vectors, stored past the caches."""
    x, logits, _ = random_inputs(1, channels, 13, 15, spec, layouts="channels_last", spread=2.0)
    x, logits = x.to(dtype), logits.to(dtype)
    y = reassemble(x, logits, backend="cpu", **spec._asdict())
    images = -(-(9 << 20) // y.nbytes)
    many = [t.expand(images, -1, -1, -1) for t in (x, logits)]
    assert torch.equal(reassemble(*many, backend="cpu", **spec._asdict()), y.expand(images, -1, -1, -1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_products_are_rounded(dtype, layout):
    """All bit patterns: subnormal numbers, infinities, NaN, ties and overflow."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.reshape(1, 64, 32, 32).contiguous(memory_format=layout)
    factors = every[torch.randint(0, 1 << 16, (1, 1, 32, 32))]
    factors[:, :, ::2] = 1
    y = reassemble_weights(x, factors, kernel_size=1, normalizer="none", backend="cpu")
    torch.testing.assert_close(y, (x.float() * factors.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-7), (torch.float64, 1e-15)], ids=str)
def test_weights_are_accurate_however_small(dtype, unit, plain, plain_kernel, monkeypatch):
    """The exponential is compared by its relative error, which a comparison of whole sums does not show."""
    if plain:
        monkeypatch.setattr(cpu, "library", lambda: plain_kernel)
    logits = torch.linspace(-86, 20, 4096, dtype=dtype).view(1, 1, 64, 64)
    weights = reassemble(torch.ones_like(logits), logits, kernel_size=1, normalizer="sigmoid", backend="cpu")
    error = weights.double() / logits.double().sigmoid() - 1
    # without fused multiply-adds, the exponent is rounded
    assert (error.abs() <= unit * (4 + logits.abs())).all()


def test_own_threads_give_the_same(monkeypatch):
    """Without PyTorch's OpenMP runtime the kernel starts its own threads."""
    torch.set_num_threads(2)
    inputs = random_inputs(1, 32, 40, 40, Spec(5, up=2), spread=2.0)
    expected = differentiate(reassemble, *inputs, kernel_size=5, up=2, backend="cpu")
    asked = []
    monkeypatch.setattr(cpu, "openmp_parallel", lambda: asked.append(True))
    actual = differentiate(reassemble, *inputs, kernel_size=5, up=2, backend="cpu")
    assert len(asked) == 2
    assert all(torch.equal(actual[name], result) for name, result in expected.items())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_forked_workers_do_not_wait_for_threads_of_the_parent():
    torch.set_num_threads(2)
    # enough work for two threads of the kernel, and too little for PyTorch's own threads, which do not survive a fork
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


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_children_and_grandchildren_of_busy_threads_end_well():
    """No process that is forked in the middle of parallel calls dies by a signal, hangs, or computes other bits."""
    torch.set_num_threads(2)
    spec = Spec(7, up=2)
    # work for two threads here, too small to be shared out by PyTorch itself, which does not survive a fork
    x, logits, dy = random_inputs(1, 16, 16, 16, spec, spread=2.0)

    def digest(threads: int) -> str:
        torch.set_num_threads(threads)
        if threads > 1:
            results = {"y": reassemble(x, logits, backend="cpu", **spec._asdict())}
        else:
            results = differentiate(reassemble, x, logits, dy, backend="cpu", **spec._asdict())
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in results.values())).hexdigest()

    expected = [digest(1), digest(2)]
    context = multiprocessing.get_context("fork")

    def work(generations: int) -> None:
        assert [digest(1), digest(2)] == expected
        if generations:
            child = context.Process(target=work, args=(generations - 1,))
            child.start()
            child.join(60)
            assert child.exitcode == 0

    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [digest(2) for _ in iter(stop.is_set, True)]) for _ in range(2)]
    children = [context.Process(target=work, args=(1,)) for _ in range(8)]
    for thread in busy:
        thread.start()
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        # None is a child that hangs, a negative number the signal that ended it
        assert [child.exitcode for child in children] == [0] * len(children)
    finally:
        stop.set()
        for thread in busy:
            thread.join()
        for child in children:
            child.kill()
