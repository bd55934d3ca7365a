"""Neighbouring pixels of a row in NCHW as values of one thread, for the kernels that sum and need no matrix units.

A *vector* is 1, 2 or 4 neighbours that a thread loads or stores with one instruction.
"""

import triton
import triton.language as tl


@triton.jit
def as_offset(values):
    """Return offsets that are not negative in the type that takes the fewest instructions to add to a pointer."""
    if values.dtype == tl.int64:
        return values
    else:
        return values.to(tl.uint32)


@triton.jit
def advance(offsets, step):
    """Return offsets that lie a step after others."""
    moved = ()
    for k in tl.static_range(len(offsets)):
        moved += (offsets[k] + step,)
    return moved


@triton.jit
def load_vector(ptr, VECTOR: tl.constexpr):
    """Return the VECTOR neighbours that begin at each address, in float32."""
    if VECTOR == 1:
        return (tl.load(ptr).to(tl.float32),)
    elif VECTOR == 2:
        a, b = tl.split(tl.load(ptr[:, None] + tl.arange(0, 2)[None, :]).to(tl.float32))
        return a, b
    else:
        block = tl.load(ptr[:, None] + tl.arange(0, 4)[None, :]).to(tl.float32)
        even, odd = tl.split(tl.reshape(block, (block.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def join4(a, b, c, d):
    """Return a block [M, 4] of four columns."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def store_vector(ptr, exists, values, FIRST: tl.constexpr, VECTOR: tl.constexpr):
    """Store VECTOR of the values, from FIRST on, at each address and after it."""
    if VECTOR == 1:
        tl.store(ptr, values[FIRST].to(ptr.dtype.element_ty), mask=exists)
    elif VECTOR == 2:
        block = tl.join(values[FIRST], values[FIRST + 1])
        tl.store(ptr[:, None] + tl.arange(0, 2)[None, :], block.to(ptr.dtype.element_ty), mask=exists[:, None])
    else:
        block = join4(values[FIRST], values[FIRST + 1], values[FIRST + 2], values[FIRST + 3])
        tl.store(ptr[:, None] + tl.arange(0, 4)[None, :], block.to(ptr.dtype.element_ty), mask=exists[:, None])
