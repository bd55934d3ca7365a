"""Special functions in float32, by single instructions of the special function units.

Triton's own functions add range checks, and a polynomial for the logarithm: 6 and 37 machine instructions in place of 3 and 2. The errors
are below 2**-21 relative to the result, or to 1 for logarithms of numbers below 2.
"""

import torch
import triton
import triton.language as tl

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# neither AMD's compiler nor the interpreter takes PTX
TAKES_PTX = tl.constexpr(not torch.version.hip and not triton.knobs.runtime.interpret)


@triton.jit
def exp(x):
    """Return e to the power of x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log(x):
    """Return the natural logarithm of x."""
    if TAKES_PTX:
        return LN_2 * tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log(x)


@triton.jit
def reciprocal(x):
    """Return 1 / x."""
    if TAKES_PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x
