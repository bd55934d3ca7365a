"""The emulator runs Triton's compiled code like a GPU: its outputs against NumPy and PyTorch in float64."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from ptx import Fault  # noqa: E402
from ptx.jit import launch  # noqa: E402

DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def error(actual, expected):
    """Relative error in float64; NaN where an element was never written."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


@triton.jit
def elementwise(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    y = tl.exp(-tl.abs(x)) + tl.maximum(x, 0.5) / (1.0 + x * x) - tl.sqrt(tl.abs(x)) * tl.log(2.0 + tl.abs(x))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 1000, 4096])
def test_elementwise_functions_in_every_dtype(dtype, n):
    x, y = random(n, dtype=dtype), poisoned(n, dtype=dtype)
    launch(elementwise, triton.cdiv(n, 512), x, y, n, BLOCK=512)
    t = x.double()
    expected = (-t.abs()).exp() + t.clamp(min=0.5) / (1 + t * t) - t.abs().sqrt() * (2 + t.abs()).log()
    assert error(y, expected) < 2 * DTYPES[dtype]


@triton.jit
def row_softmax(x_ptr, y_ptr, top_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offs, mask=offs < columns, other=-float("inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * columns + offs, (p / tl.sum(p, 0)).to(y_ptr.dtype.element_ty), mask=offs < columns)
    tl.store(top_ptr + row, tl.argmax(x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_warps", [1, 4])
def test_reductions_within_and_across_warps(dtype, num_warps):
    x, y, top = random(7, 300, dtype=dtype), poisoned(7, 300, dtype=dtype), torch.full((7,), -1, dtype=torch.int32)
    launch(row_softmax, 7, x, y, top, 300, BLOCK=512, num_warps=num_warps)
    assert error(y, x.double().softmax(1)) < DTYPES[dtype]
    assert torch.equal(top.long(), x.argmax(1))


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, sam, sak, sbk, sbn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * sam + (start + k)[None] * sak, mask=(m < M)[:, None] & (start + k < K)[None], other=0.0)
        b = tl.load(b_ptr + (start + k)[:, None] * sbk + n[None] * sbn, mask=(start + k < K)[:, None] & (n < N)[None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None], acc.to(c_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None])


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float16, "ieee", 1e-3),
        (torch.bfloat16, "ieee", 4e-3),
        (torch.float32, "tf32", 1e-3),
        (torch.float32, "tf32x3", 2e-6),
        (torch.float32, "ieee", 1e-6),
    ],
)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_tensor_cores_fed_by_asynchronous_copies(dtype, precision, tolerance, num_stages):
    m, n, k = 48, 80, 96
    # both meet every dtype and every number of stages
    transposed = (list(DTYPES).index(dtype) + (precision == "tf32") + num_stages) % 2 == 0
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1).T if transposed else random(k, n, dtype=dtype, seed=1)
    c = poisoned(m, n, dtype=dtype)
    sizes = dict(BM=32, BN=32, BK=32, PRECISION=precision)
    stats = launch(matmul, (2, 3), a, b, c, m, n, k, *a.stride(), *b.stride(), num_stages=num_stages, **sizes)
    assert error(c, a.double() @ b.double()) < tolerance
    assert ("tensor" in stats["warp_insts_by_class"]) == (dtype != torch.float32 or precision != "ieee")
    assert ("cp.async" in stats["warp_insts_by_class"]) == (num_stages > 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("width", "others"), [(16, False), (32, True), (128, False)])
def test_tensor_cores_of_hopper(dtype, tolerance, width, others):
    m, n, k = 96, 2 * width, 96
    # both meet every dtype and every width
    transposed = (dtype == torch.bfloat16) != others
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1).T if transposed else random(k, n, dtype=dtype, seed=1)
    c = poisoned(m, n, dtype=dtype)
    sizes = dict(BM=64, BN=width, BK=32, PRECISION="tf32")
    stats = launch(matmul, (2, 2), a, b, c, m, n, k, *a.stride(), *b.stride(), capability=90, **sizes)
    assert error(c, a.double() @ b.double()) < tolerance
    assert stats["mma_flops"] == 4 * 2 * 64 * width * 96
    assert stats["warp_insts_by_class"]["tensor"] <= 4 * 4 * 3 * 4


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), [(torch.float16, "ieee", 1e-3), (torch.float32, "tf32x3", 2e-6)])
@pytest.mark.parametrize(("rows", "width", "transposed"), [(64, 32, True), (128, 64, False)])
def test_tensor_cores_of_blackwell(dtype, precision, tolerance, rows, width, transposed):
    m, n, k = 2 * rows - 30, 2 * width, 64
    a, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1).T if transposed else random(k, n, dtype=dtype, seed=1)
    c = poisoned(m, n, dtype=dtype)
    sizes = dict(BM=rows, BN=width, BK=32, PRECISION=precision)
    stats = launch(matmul, (2, 2), a, b, c, m, n, k, *a.stride(), *b.stride(), capability=100, **sizes)
    assert error(c, a.double() @ b.double()) < tolerance
    products = 3 if precision == "tf32x3" else 1
    assert stats["mma_flops"] == products * 4 * 2 * rows * width * k


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_narrow_numbers_of_blackwell(dtype):
    x, y, top = random(7, 300, dtype=dtype), poisoned(7, 300, dtype=dtype), torch.full((7,), -1, dtype=torch.int32)
    launch(row_softmax, 7, x, y, top, 300, BLOCK=512, capability=100)
    assert error(y, x.double().softmax(1)) < DTYPES[dtype]
    assert torch.equal(top.long(), x.argmax(1))
    n = 1000
    x, y = random(n, dtype=dtype), poisoned(n, dtype=dtype)
    launch(elementwise, 2, x, y, n, BLOCK=512, capability=100)
    t = x.double()
    assert error(y, (-t.abs()).exp() + t.clamp(min=0.5) / (1 + t * t) - t.abs().sqrt() * (2 + t.abs()).log()) < 2 * DTYPES[dtype]


@triton.jit
def transpose(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None])
    tl.store(y_ptr + n[:, None] * M + m[None], tl.trans(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.int64])
def test_layout_conversions_through_shared_memory(dtype):
    x = random(64, 32).mul(50).to(dtype)
    y = torch.zeros(32, 64, dtype=dtype)
    launch(transpose, 1, x, y, M=64, N=32)
    assert torch.equal(y, x.T)


@triton.jit
def gather(x_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offs, mask=offs < n, other=-1)
    inside = index >= 0
    x = tl.load(x_ptr + tl.where(inside, index, 0), mask=inside, other=-1.0)
    tl.store(y_ptr + offs, x, mask=offs < n)


def test_gather_reads_nothing_where_masked():
    x, y = random(50), poisoned(333)
    index = torch.randint(-20, 50, (333,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    launch(gather, 3, x, index, y, 333, BLOCK=128)
    assert torch.equal(y, torch.where(index >= 0, x[index.clamp(min=0).long()], -1.0))


@triton.jit
def integers(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    y = a // b * 1000003 + a % b + ((a << 3) ^ (b >> 2)) - tl.minimum(a, b) * tl.abs(b) + (a & b) + (~a | b)
    tl.store(y_ptr + offs, y + tl.where(a < b, a, -b).to(tl.float32).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_arithmetic(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**20), 2**20, (256,), generator=generator, dtype=dtype)
    b = torch.randint(1, 5000, (256,), generator=generator, dtype=dtype) * torch.randint(0, 2, (256,), generator=generator).mul(2).sub(
        1
    ).to(dtype)
    y = torch.zeros_like(a)
    launch(integers, 1, a, b, y, BLOCK=256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    expected = quotient * 1000003 + (a - quotient * b) + ((a << 3) ^ (b >> 2)) - torch.minimum(a, b) * b.abs() + (a & b) + (~a | b)
    assert torch.equal(y, expected + torch.where(a < b, a, -b))


@triton.jit
def scan(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.cumsum(tl.load(x_ptr + offs), 0))


def test_scans_shuffle_between_lanes_and_warps():
    x, y = random(512), poisoned(512)
    launch(scan, 1, x, y, BLOCK=512)
    assert error(y, x.double().cumsum(0)) < 1e-6


@triton.jit
def histogram(x_ptr, count_ptr, total_ptr, top_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.atomic_add(count_ptr + x, 1, mask=offs < n)
    tl.atomic_add(total_ptr, tl.sum(x.to(tl.float32), 0))
    tl.atomic_max(top_ptr, tl.max(x, 0))


def test_atomics():
    x = torch.randint(0, 9, (700,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    count, total, top = torch.zeros(9, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    launch(histogram, 3, x, count, total, top, 700, BLOCK=256)
    assert torch.equal(count.long(), x.bincount(minlength=9))
    assert (total.item(), top.item()) == (x.sum().item(), x.max().item())


@triton.jit
def collatz(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    while x != 1:
        x = tl.where(x % 2 == 0, x // 2, 3 * x + 1)
        steps += 1
    tl.store(y_ptr + tl.program_id(0), steps)


def test_loops_of_a_length_that_differs_between_blocks():
    x, y = torch.arange(1, 41, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    launch(collatz, 40, x, y, num_warps=1)
    assert y[26] == 111
    assert y.max() == 111


@triton.jit
def convert(x_ptr, half_ptr, bf16_ptr, int_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(half_ptr + offs, x.to(tl.float16))
    tl.store(bf16_ptr + offs, x.to(tl.bfloat16))
    tl.store(int_ptr + offs, x.to(tl.int32))


def test_conversions_round_to_nearest_even():
    x = torch.cat([random(124) * 1000, torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, -0.0])])
    half, bf16, whole = poisoned(128, dtype=torch.float16), poisoned(128, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.int32)
    launch(convert, 1, x, half, bf16, whole, BLOCK=128)
    assert torch.equal(half, x.half())
    assert torch.equal(bf16, x.bfloat16())
    assert torch.equal(whole, x.int())


@triton.jit
def copy(x_ptr, y_ptr, rows, columns, stride_xr, stride_xc, stride_yr, stride_yc, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column, mask = offs // columns, offs % columns, offs < rows * columns
    x = tl.load(x_ptr + row * stride_xr + column * stride_xc, mask=mask)
    tl.store(y_ptr + row * stride_yr + column * stride_yc, x, mask=mask)


def test_arguments_of_any_strides_keep_what_lies_between():
    storage = poisoned(9, 14)
    x, y = random(11, 5).T, storage[2:7, 1:12]
    launch(copy, 1, x, y, 5, 11, *x.stride(), *y.stride(), BLOCK=64)
    assert torch.equal(y, x)
    assert storage.isnan().sum() == storage.numel() - 55


def test_buffers_larger_than_the_machine():
    far = 2**31 + 64
    x = torch.from_numpy(np.zeros(far + 8, np.float32)).as_strided((2, 8), (far, 1))
    x.copy_(random(2, 8))
    y = poisoned(2, 8)
    launch(copy, 1, x, y, 2, 8, far, 1, 8, 1, BLOCK=16)
    assert torch.equal(y, x)


def test_an_access_out_of_bounds_is_a_fault():
    x, y = random(5, 11), poisoned(5, 11)
    with pytest.raises(Fault, match=r"out of bounds \(1 lanes, the first at \w+ \+220 of 220 bytes\)"):
        launch(copy, 1, x, y, 4, 14, 11, 1, 14, 1, BLOCK=64)


@triton.jit
def read_across(x_ptr, y_ptr, BLOCK: tl.constexpr):
    # two bytes into the first element
    x = tl.load((x_ptr.to(tl.int64) + 2).to(tl.pointer_type(tl.float32)))
    tl.store(y_ptr + tl.arange(0, BLOCK), x)


def test_a_misaligned_access_is_a_fault():
    with pytest.raises(Fault, match="misaligned 4-byte access"):
        launch(read_across, 1, random(4), poisoned(16), BLOCK=16)


@triton.jit
def scaled_product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    places = i[:, None] * SIZE + i[None]
    a = tl.load(a_ptr + places)
    product = tl.dot(a, tl.load(b_ptr + places))
    # the second product takes its left side from registers
    tl.store(c_ptr + places, tl.dot((product * 0.125).to(tl.float16), tl.load(b_ptr + places)).to(tl.float16))


@pytest.mark.parametrize("capability", [80, 90])
def test_a_product_feeds_the_next_from_registers(capability):
    a, b, c = random(64, 64, dtype=torch.float16), random(64, 64, dtype=torch.float16, seed=1), poisoned(64, 64, dtype=torch.float16)
    launch(scaled_product, 1, a, b, c, SIZE=64, capability=capability)
    assert error(c, a.double() @ b.double() * 0.125 @ b.double()) < 2e-3
