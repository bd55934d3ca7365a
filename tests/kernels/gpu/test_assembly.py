"""Compilation of launches for GPUs that are not present, and their assembly."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from carafepp.kernels.geometry import Spec  # noqa: E402
from carafepp.kernels.gpu.assembly import compile_launch, count_loop_spills, read_assembly  # noqa: E402
from carafepp.kernels.gpu.launch import Launch  # noqa: E402
from carafepp.kernels.gpu.tiles.residency import resident_blocks  # noqa: E402
from carafepp.kernels.gpu.training_step import build_training_step  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def product(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None])
    tl.store(y_ptr + i[:, None] * BLOCK + i[None], tl.dot(x, x).to(tl.float16))


def assemble(capability, block=64, num_warps=4):
    x, y = (torch.empty(block, block, dtype=torch.float16, device="meta") for _ in range(2))
    launch = Launch(product, (1, 1, 1), {"x_ptr": x, "y_ptr": y}, {"BLOCK": block}, num_warps=num_warps, num_stages=1)
    return read_assembly(compile_launch(launch, capability))


@pytest.mark.parametrize(("capability", "name"), [(80, "HMMA"), (90, "HGMMA"), (100, "HMMA|UTCHMMA")])
def test_every_architecture_is_read(capability, name):
    kernel = assemble(capability)
    assert kernel.spills == 0
    assert 16 < kernel.registers < 256
    assert kernel.widest_load == kernel.widest_store == 128
    assert kernel.shared >= 64 * 64 * 2
    assert kernel.barriers >= 1
    assert any(opcode in name.split("|") and count > 0 for opcode, count in kernel.tensor_core.items())
    assert kernel.instructions > sum(kernel.tensor_core.values()) > 0


def test_a_tile_too_large_for_its_warps_is_seen_to_spill():
    assert assemble(80, block=128, num_warps=1).spills > 0


def test_spills_in_loops_are_told_from_others():
    listing = """
        /*0000*/                   STL [R1], R4 ;
.L_x_0:
        /*0010*/                   LDL.LU R4, [R1] ;
.L_x_1:
        /*0020*/                   STL.64 [R1+0x8], R6 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   LDL R5, [R1+0x8] ;
.L_x_2:
        /*0060*/                   EXIT ;
"""
    assert count_loop_spills(listing) == 1
    assert count_loop_spills(listing.replace("`(.L_x_2)", "`(.L_x_0)")) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_compile_for_amd_gpus(dtype, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    # Triton 3.4 calls a linker that may not be there
    monkeypatch.setenv("TRITON_HIP_LLD_PATH", "/bin/true")
    step = build_training_step(8, 64, 12, 16, Spec(5, up=2), dtype, torch.channels_last)
    (launch,) = step.build_launches("forward", capability=(9, 4))
    assembly = triton.compile(launch.source(), target=GPUTarget("hip", "gfx942", 64), options=launch.options).asm["amdgcn"]
    assert ".vgpr_spill_count: 0" in assembly
    # products are computed by the matrix units
    assert "v_mfma_f32_" in assembly


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        # 64 warps of 32 registers fill the file exactly; one register more goes to the next eight: 51 warps, placed in fours
        (80, 32, 0, 4, (16, "warps")),
        (80, 33, 0, 4, (12, "registers")),
        (80, 255, 0, 8, (1, "registers")),
        (80, 32, 40 << 10, 4, (4, "shared")),
        (90, 32, 40 << 10, 4, (5, "shared")),
        (80, 16, 0, 1, (32, "blocks")),
        (86, 32, 0, 4, (12, "warps")),
        (80, 32, 200 << 10, 4, (0, "shared")),
    ],
)
def test_occupancy_limits(capability, registers, shared, warps, expected):
    assert resident_blocks(capability, registers, shared, warps) == expected


def test_kernels_are_parsed_one_at_a_time(monkeypatch):
    inside, overlaps = [], []

    def make_ir(self, *arguments):
        inside.append(self)
        time.sleep(0.05)
        overlaps.append(len(inside) > 1)
        inside.remove(self)

    monkeypatch.setattr(ASTSource, "make_ir", make_ir)
    launch = Launch(product, (1, 1, 1), {"x_ptr": torch.empty(1), "y_ptr": torch.empty(1)}, {"BLOCK": 16}, num_warps=1, num_stages=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: source.make_ir(None), [launch.source() for _ in range(4)]))
    assert overlaps == [False] * 4
