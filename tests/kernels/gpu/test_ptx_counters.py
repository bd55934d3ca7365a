"""The emulator's counters, which agree with a profiler: access patterns and instructions with known counts, written in PTX."""

import numpy as np
import pytest
import torch
from ptx import A100, Fault, Unsupported, dram_microseconds, run
from ptx.caches import LRUCache, RoomyCache

HEADER = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 .ptr .global .align 16 p0, .param .u64 p1, .param .u32 p2) .reqntid {threads}
{{
.reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .pred %p<8>; .reg .f32 %f<8>;
.shared .align 16 .b8 memory[16384];
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u32 %r1, [p2];
mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x;
{body}
ret;
}}
"""
# lane i of every warp reads 4 bytes at byte (global index) * p2
COPY = """
mad.lo.u32 %r5, %r3, %r4, %r2; mul.wide.u32 %rd3, %r5, %r1; add.u64 %rd4, %rd1, %rd3;
ld.global.b32 %r6, [%rd4]; mul.wide.u32 %rd5, %r5, 4; add.u64 %rd6, %rd2, %rd5; st.global.b32 [%rd6], %r6;
"""


def kernel(body, threads=128):
    return HEADER.format(body=body, threads=threads)


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (16, 16), (32, 32), (64, 32), (0, 1)])
def test_sectors_of_a_strided_load(stride, sectors):
    x, y = np.arange(32768, dtype=np.uint32), np.zeros(512, np.uint32)
    stats = run(kernel(COPY), 4, [x, y, stride])
    assert (y == x[np.arange(512) * stride // 4]).all()
    assert stats["global_ld_requests"] == stats["global_st_requests"] == 16
    assert stats["sectors_per_ld_request"] == sectors
    assert stats["sectors_per_st_request"] == 4
    assert stats["global_ld_sectors_ideal"] == 64


def test_a_load_off_its_sectors_costs_one_more():
    y = np.zeros(512, np.uint32)
    assert run(kernel(COPY.replace("[%rd4]", "[%rd4+4]")), 4, [np.zeros(1024, np.uint32), y, 4])["sectors_per_ld_request"] == 5


def test_traffic_of_a_copy_is_its_bytes():
    x, y = np.ones(4096, np.float32), np.zeros(4096, np.float32)
    stats = run(kernel(COPY), 32, [x, y, 4])
    assert stats["dram_read_bytes"] == stats["dram_write_bytes"] == x.nbytes
    assert stats["dram_bytes"] == stats["dram_bytes_compulsory"] == 2 * x.nbytes
    assert [buffer.get("ld_bytes", 0) + buffer.get("st_bytes", 0) for buffer in stats["per_buffer"].values()] == [x.nbytes, y.nbytes]
    # 3 parameters, 3 special registers, 7 instructions of the copy, ret
    assert stats["warp_insts"] == 32 * 4 * 14
    assert stats["bound"]["dram"] == pytest.approx(dram_microseconds(2 * x.nbytes, A100)) == pytest.approx(32768 / (2039e3 * 0.92))


def test_reuse_is_served_by_the_caches():
    # every block reads the same 512 bytes: DRAM once, L2 once per multiprocessor, L1 for the others
    x, y = np.ones(128, np.uint32), np.zeros(128, np.uint32)
    same = COPY.replace("mad.lo.u32 %r5, %r3, %r4, %r2", "mov.u32 %r5, %r2")
    stats = run(kernel(same), 216, [x, y, 4])
    assert stats["dram_read_bytes"] == 512
    assert stats["l2_sectors_read"] == 16 * A100.multiprocessors
    assert stats["l1_hit_rate"] == 0.5


def test_blocks_share_the_first_cache_with_those_alone_that_registers_leave_room_for():
    # every thread reads a line of its own twice: 16 KiB for each block
    twice = COPY.replace("ld.global.b32 %r6, [%rd4];", "ld.global.b32 %r6, [%rd4]; bar.sync 0; ld.global.b32 %r6, [%rd4];")
    x, y = np.zeros(1080 * 128 * 32, np.uint32), np.zeros(1080 * 128, np.uint32)
    alone, together = (run(kernel(twice), 1080, [x, y, 128], resident=resident)["l1_hit_rate"] for resident in (1, 32))
    assert alone == 0.5
    # the last blocks are few
    assert together < 0.05


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (12, 1), (64, 16), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts_of_a_strided_access(stride, wavefronts):
    body = """
    and.b32 %r5, %r2, 31; mul.lo.u32 %r5, %r5, %r1; mov.u32 %r6, memory; add.u32 %r5, %r5, %r6;
    st.shared.b32 [%r5], %r2; bar.sync 0; ld.shared.b32 %r7, [%r5];
    """
    stats = run(kernel(body), 1, [np.zeros(4, np.uint32), np.zeros(4, np.uint32), stride])
    assert stats["shared_ld_wavefronts"] == stats["shared_st_wavefronts"] == 4 * wavefronts
    assert stats["shared_bank_conflicts"] == 2 * 4 * (wavefronts - 1)


@pytest.mark.parametrize(("width", "vector", "wavefronts"), [("b32", "", 1), ("b64", "", 2), ("v4.b32", "v", 4)])
def test_wide_shared_accesses_take_a_phase_per_32_words(width, vector, wavefronts):
    target = "{%r8, %r9, %r10, %r11}" if vector else "%rd7" if width == "b64" else "%r8"
    size = {"b32": 4, "b64": 8, "v4.b32": 16}[width]
    body = f"mul.lo.u32 %r5, %r2, {size}; mov.u32 %r6, memory; add.u32 %r5, %r5, %r6; st.shared.{width} [%r5], {target};"
    stats = run(kernel(body), 1, [np.zeros(4, np.uint32), np.zeros(4, np.uint32), 0])
    assert (stats["shared_st_wavefronts"], stats["shared_bank_conflicts"]) == (4 * wavefronts, 0)


def test_divergent_threads_meet_again():
    body = """
    and.b32 %r5, %r2, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra EVEN;
    mov.u32 %r6, 100; bra JOIN;
    EVEN: mov.u32 %r6, 200;
    JOIN: bar.sync 0; mul.wide.u32 %rd3, %r2, 4; add.u64 %rd4, %rd2, %rd3; st.global.b32 [%rd4], %r6;
    """
    y = np.zeros(128, np.uint32)
    stats = run(kernel(body), 1, [np.zeros(4, np.uint32), y, 0])
    assert (y.reshape(-1, 2) == [200, 100]).all()
    assert stats["divergent_branches"] == 4
    assert stats["global_st_requests"] == 4


def test_threads_that_left_hold_no_barrier():
    body = """
    setp.lt.u32 %p1, %r2, 40; @%p1 exit;
    cvta.to.global.u64 %rd7, %rd2; createpolicy.fractional.L2::evict_last.b64 %rd8, 1.0;
    bar.sync 0; red.global.add.u32 [%rd7], 1;
    """
    y = np.zeros(1, np.uint32)
    stats = run(kernel(body), 1, [np.zeros(4, np.uint32), y, 0])
    assert y[0] == 88
    # the first warp left as a whole before the barrier
    assert stats["warp_insts_by_class"]["sync"] == stats["global_red_requests"] == 3


def test_a_kernel_that_stops_itself_is_a_fault():
    with pytest.raises(Fault, match="stopped itself: trap"):
        run(kernel("trap;"), 1, [np.zeros(4, np.uint32), np.zeros(4, np.uint32), 0])


def test_shared_memory_holds_nan_until_it_is_written():
    body = "mov.u32 %r5, memory; ld.shared.f32 %f1, [%r5]; st.global.f32 [%rd2], %f1;"
    y = np.zeros(1, np.float32)
    run(kernel(body), 1, [np.zeros(4, np.uint32), y, 0])
    assert np.isnan(y[0])


def test_what_the_emulator_does_not_know_is_named():
    for text in ("nanosleep.u32 64;", "tcgen05.shift.cta_group::1.down [%r5];", "mbarrier.arrive.shared.b64 %rd9, [%r5];"):
        with pytest.raises(Unsupported, match=text.split(".")[0]):
            run(kernel(text), 1, [np.zeros(4, np.uint32), np.zeros(4, np.uint32), 0])
    with pytest.raises(Fault, match="shared access out of bounds"):
        run(kernel("mov.u32 %r5, memory; ld.shared.b32 %r6, [%r5+16384];"), 1, [np.zeros(4, np.uint32), np.zeros(4, np.uint32), 0])


def i32(x):
    return x.astype(np.int32)


# instruction on a = %r10, b = %r11, c = %r12 -> %r13, and what it means for uint32 arrays
SEMANTICS = {
    "add.s32 %r13, %r10, %r11": lambda a, b, c: a + b,
    "add.s16x2 %r13, %r10, %r11": lambda a, b, c: (a & 0xFFFF) + (b & 0xFFFF) & 0xFFFF | ((a >> 16) + (b >> 16) & 0xFFFF) << 16,
    "mad.lo.s32 %r13, %r10, %r11, %r12": lambda a, b, c: a * b + c,
    "mul.hi.u32 %r13, %r10, %r11": lambda a, b, c: a.astype(np.uint64) * b >> np.uint64(32),
    "mul.hi.s32 %r13, %r10, %r11": lambda a, b, c: i32(a).astype(np.int64) * i32(b) >> 32,
    "shl.b32 %r13, %r10, %r12": lambda a, b, c: np.where(c < 32, a << (c & 31), 0),
    "shr.u32 %r13, %r10, %r12": lambda a, b, c: np.where(c < 32, a >> (c & 31), 0),
    "shr.s32 %r13, %r10, %r12": lambda a, b, c: i32(a) >> np.minimum(c, 31).astype(np.int32),
    "lop3.b32 %r13, %r10, %r11, %r12, 0xE8": lambda a, b, c: a & b | a & c | b & c,
    "shf.l.wrap.b32 %r13, %r10, %r11, 7": lambda a, b, c: b << 7 | a >> 25,
    "shf.r.clamp.b32 %r13, %r10, %r11, 7": lambda a, b, c: a >> 7 | b << 25,
    "prmt.b32 %r13, %r10, %r11, 0x7610": lambda a, b, c: a & 0xFFFF | b & 0xFFFF0000,
    "prmt.b32 %r13, %r10, %r11, 0xB3": lambda a, b, c: a >> 24 | np.where(a >> 31, 0xFF00, 0) | (a & 255) * 0x1010000,
    "bfe.u32 %r13, %r10, 5, 9": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r13, %r10, 5, 9": lambda a, b, c: i32(a << 18) >> 23,
    "bfi.b32 %r13, %r11, %r10, 4, 8": lambda a, b, c: a & ~np.uint32(0xFF0) | (b & 255) << 4,
    "mov.b64 %rd7, {%r10, %r11}; bfe.u64 %rd7, %rd7, 30, 12; cvt.u32.u64 %r13, %rd7": lambda a, b, c: a >> 30 | (b & 1023) << 2,
    "bfe.s32 %r13, %r10, 25, 32": lambda a, b, c: i32(a) >> 25,
    "popc.b32 %r13, %r10": lambda a, b, c: np.bitwise_count(a),
    "clz.b32 %r13, %r10": lambda a, b, c: 32 - np.ceil(np.log2(a.astype(np.float64) + 1)),
    "brev.b32 %r13, %r10": lambda a, b, c: np.array([int(f"{v:032b}"[::-1], 2) for v in a]),
    "min.s32 %r13, %r10, %r11": lambda a, b, c: np.minimum(i32(a), i32(b)),
    "max.u32 %r13, %r10, %r11": lambda a, b, c: np.maximum(a, b),
    "div.s32 %r13, %r10, 7": lambda a, b, c: np.trunc(i32(a) / 7),
    "rem.s32 %r13, %r10, 7": lambda a, b, c: np.fmod(i32(a), 7),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r13, %r10, %r12, %p1": lambda a, b, c: np.where(i32(a) < i32(b), a, c),
    "cvt.rn.f32.s32 %f1, %r10; cvt.rzi.s32.f32 %r13, %f1": lambda a, b, c: np.clip(
        i32(a).astype(np.float32).astype(np.int64), None, 2**31 - 1
    ),
    "shfl.sync.bfly.b32 %r13, %r10, 5, 31, -1": lambda a, b, c: a.reshape(-1, 32)[:, np.arange(32) ^ 5].ravel(),
    "shfl.sync.up.b32 %r13, %r10, 3, 0, -1": lambda a, b, c: a.reshape(-1, 32)[:, [0, 1, 2, *range(29)]].ravel(),
    "shfl.sync.down.b32 %r13, %r10, 3, 31, -1": lambda a, b, c: a.reshape(-1, 32)[:, [*range(3, 32), 29, 30, 31]].ravel(),
    "shfl.sync.idx.b32 %r13, %r10, 9, 31, -1": lambda a, b, c: a.reshape(-1, 32)[:, 9].repeat(32),
    "redux.sync.add.s32 %r13, %r10, -1": lambda a, b, c: a.reshape(-1, 32).sum(1, dtype=np.uint32).repeat(32),
    "setp.gt.u32 %p1, %r10, %r11; vote.sync.ballot.b32 %r13, %p1, -1": lambda a, b, c: (
        ((a > b).reshape(-1, 32) * (1 << np.arange(32))).sum(1).repeat(32)
    ),
}


@pytest.mark.parametrize("text", SEMANTICS)
def test_instructions(text):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 128), dtype=np.uint32)
    a[:4], b[:2] = [0, 2**31, 2**32 - 1, 2**31 - 1], [2**32 - 1, 0]
    c = rng.integers(0, 40, 128, dtype=np.uint32)
    body = "mul.wide.u32 %rd3, %r2, 4; add.u64 %rd4, %rd1, %rd3; add.u64 %rd6, %rd2, %rd3;"
    body += (
        f"ld.global.b32 %r10, [%rd4]; ld.global.b32 %r11, [%rd4+512]; ld.global.b32 %r12, [%rd4+1024]; {text}; st.global.b32 [%rd6], %r13;"
    )
    y = np.zeros(128, np.uint32)
    run(kernel(body), 1, [np.concatenate([a, b, c]), y, 0])
    assert (y == np.asarray(SEMANTICS[text](a, b, c)).astype(np.int64).astype(np.uint32)).all()


FUNCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_special_functions(op):
    x, y = np.linspace(0.1, 20, 128).astype(np.float32), np.zeros(128, np.float32)
    body = "mul.wide.u32 %rd3, %r2, 4; add.u64 %rd4, %rd1, %rd3; add.u64 %rd6, %rd2, %rd3;"
    stats = run(kernel(f"{body} ld.global.f32 %f1, [%rd4]; {op}.approx.ftz.f32 %f2, %f1; st.global.f32 [%rd6], %f2;"), 1, [x, y, 0])
    np.testing.assert_allclose(y, FUNCTIONS[op](x.astype(np.float64)), rtol=1e-6, atol=1e-6)
    assert stats["warp_insts_by_class"]["mufu"] == 4


def test_a_roomy_cache_counts_as_one_that_replaces_and_never_has_to():
    rng = np.random.default_rng(0)
    roomy, exact = RoomyCache(100), LRUCache(100 * 128)
    for _ in range(20):
        lines, masks = rng.integers(0, 100, 30), rng.integers(1, 16, 30)
        units = np.zeros(30, np.int64)
        assert np.bitwise_count(roomy.read(units, lines, masks)).sum() == np.bitwise_count(exact.read(units, lines, masks)).sum()
        roomy.write(units[:5], lines[:5], masks[:5])
        exact.write(units[:5], lines[:5], masks[:5])
    assert (roomy.hits, roomy.misses, roomy.written()) == (exact.hits, exact.misses, exact.written())


def test_the_least_recently_used_line_leaves_first():
    cache = LRUCache(2 * 128)

    def read(*lines):
        return cache.read(np.zeros(len(lines), int), np.array(lines), np.ones(len(lines), int)).tolist()

    assert read(1, 2, 1, 3, 1, 2) == [1, 1, 0, 1, 0, 1]
    cache.write(np.zeros(1, int), np.array([2]), np.array([3]))
    assert cache.written() == 2
    read(4, 5)
    assert cache.written_back == 2


def test_torch_and_numpy_arguments_are_the_same_memory():
    x = torch.arange(512, dtype=torch.int32)
    y = torch.zeros(512, dtype=torch.int32)
    run(kernel(COPY), 4, [x, y, 4])
    assert torch.equal(x, y)
