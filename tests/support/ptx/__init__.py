"""A PTX emulator in NumPy: executes what Triton compiles, without a GPU, and counts what the hardware would do.

Outputs, faults, sectors and compulsory bytes are exact for the PTX; the assembler's own instruction count differs from PTX's by -6 to
+24 %. Code for sm_80, sm_90 and sm_100 runs (mma.sync, wgmma, tcgen05, ldmatrix, cp.async, atomics, shuffles, bf16), bulk copies do not.
Asynchronous copies and products are complete at once, so that a missing wait does not show.
Read parser, memory, machine, then the instructions (data, arithmetic, bitwise, collectives, warpgroup, tensor_memory), then bounds and
execute.
"""

from .bounds import A100, GPU, dram_microseconds
from .execute import run
from .memory import Fault
from .parser import Unsupported

__all__ = ["A100", "GPU", "Fault", "Unsupported", "dram_microseconds", "run"]
