"""The operator on a GPU: the functions that the ops call, which plan the launches of a call once.

Forward saves one float32 log-sum-exp per window and group for backward, and nothing else. No launch uses atomics, so that both gradients
are deterministic. In NCHW, a kernel may read a channels_last copy of a large x, and the gradient to x reads weights in the order of the
output. In float32 and channels_last, large maps have weights as well. Copies and weights exist during the call alone.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution import Layouts, view_cells
from ..geometry import LSE_NORMALIZERS, Spec
from .launch import Launch, Plan, Plans, distinguish, on_device_of
from .operator_launches import INTERPRETED, backward_launches, choose_precision, forward_launches
from .tiles.geometry import multiple


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor | None, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    check_device(x)
    if lse is None:
        # training and inference share the compiled code, which stores it
        size = (x.shape[0], spec.groups, *logits.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else 0
        lse = x.new_empty(size, dtype=torch.float32)
    _run(forward_launches, (x, logits, y, lse), spec)


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill dx and dlogits, except those that are None; the other tensors are as for `forward`."""
    check_device(x)
    _run(backward_launches, (dy, x, logits, lse, dx, dlogits), spec)


def run_forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor | None, layouts: Layouts) -> None:
    """Fill y and lse as `forward` does; the logits [N, channels, Hq, Wq] are viewed as cells only to plan the launches."""
    check_device(x)
    if lse is None:
        lse = x.new_empty(layouts.lse_shape, dtype=torch.float32)
    key = forward_launches, layouts.number, logits.stride()
    _start(key, forward_launches, (x, logits, y, lse), lambda: (x, view_cells(logits, layouts), y, lse), layouts.spec)


def run_backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, layouts: Layouts) -> None:
    """Fill dx and dlogits as `backward` does; logits and their gradient [N, channels, Hq, Wq] are viewed as cells only to plan."""
    check_device(x)

    def view() -> tuple[Tensor | None, ...]:
        dcells = None if dlogits is None else view_cells(dlogits, layouts)
        return dy, x, view_cells(logits, layouts), lse, dx, dcells

    key = (
        *(backward_launches, layouts.number, dy.stride(), logits.stride()),
        None if dx is None else dx.stride(),
        None if dlogits is None else dlogits.stride(),
    )
    _start(key, backward_launches, (dy, x, logits, lse, dx, dlogits), view, layouts.spec)


class CallPlan(NamedTuple):
    """The launches of a call, and the memory that they need while they run."""

    launches: list[Plan]
    own_bytes: int  # that the launches fill and read themselves
    offsets: tuple[int, ...]  # of the tensors in this memory; those that are in use at the same time lie apart


# bytes at whose multiples the tensors of a call lie in its memory
OWN_ALIGN = 256
# A detector that meets 500 sizes of images at ten sites has 10,000 calls, of some 5 KB each.
plans: Plans[CallPlan] = Plans(16384)


def _run(build: Callable[..., list[Launch]], tensors: tuple[Any, ...], spec: Spec) -> None:
    key = build, spec, *[None if t is None else (t.shape, t.stride()) for t in tensors]
    _start(key, build, tensors, lambda: tensors, spec)


def _start(
    key: tuple, build: Callable[..., list[Launch]], tensors: tuple[Any, ...], view: Callable[[], tuple[Any, ...]], spec: Spec
) -> None:
    """Run the launches that `build` makes for the tensors of `view`, which begin where `tensors` do; `key` determines their layouts."""
    if INTERPRETED:
        for launch in build(*view(), spec):
            launch.interpret()
        return
    like = tensors[0]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    bits = functools.reduce(operator.or_, addresses)
    aligned = None if bits % 16 == 0 else tuple([address % 16 == 0 for address in addresses])
    dtype = like.dtype
    # only products of float32 have a choice of precision
    key = (*key, dtype, like.device, aligned, choose_precision() if dtype == torch.float32 else None)
    with on_device_of(like):
        plan = plans.get(key) or _plan(key, build, view(), spec)
        if plan.offsets:
            # the allocator gives this memory to later launches of the same stream alone
            memory = torch.empty(plan.own_bytes, dtype=torch.uint8, device=like.device)
            addresses += [memory.data_ptr() + offset for offset in plan.offsets]
        for launch in plan.launches:
            launch.run(addresses)


def _plan(key: tuple, build: Callable[..., list[Launch]], tensors: tuple[Any, ...], spec: Spec) -> CallPlan:
    """Plan the launches of a call."""
    given = distinguish(tensors)
    launches = build(*given, spec)
    known = {id(tensor) for tensor in given}
    owned = {
        id(value): value for launch in launches for value in launch.parameters() if isinstance(value, Tensor) and id(value) not in known
    }
    started = [Plan(launch, (*given, *owned.values())) for launch in launches]
    return plans.keep(key, CallPlan(started, *_place(list(owned.values()), launches)))


def _place(owned: list[Tensor], launches: list[Launch]) -> tuple[int, tuple[int, ...]]:
    """Return the size of the memory for tensors in the order in which launches first use them, and their offsets in it."""
    offsets, ends, lasts = [], [], []
    for tensor in owned:
        used = [number for number, launch in enumerate(launches) if any(value is tensor for value in launch.parameters())]
        # a tensor takes the place of those that no launch reads any more
        offset = max((end for end, last in zip(ends, lasts, strict=True) if last >= used[0]), default=0)
        offsets.append(offset)
        ends.append(multiple(offset + tensor.numel() * tensor.element_size(), OWN_ALIGN))
        lasts.append(used[-1])
    return max(ends, default=0), tuple(offsets)


def check_device(x: Tensor) -> None:
    """Raise ValueError for tensors on a CPU outside the interpreter of Triton."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend 'triton' takes CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1); use backend 'cpu'")
