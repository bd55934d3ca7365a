"""The operator on a GPU: which kernels to launch for given tensors, and the entry points behind the ops.

Forward saves one float32 log-sum-exp per window and group for backward, nothing else. No launch uses atomics or scratch memory: both
gradients are deterministic.
"""

import triton
from torch import Tensor

from .geometry import Spec, is_channels_last
from .launch import Launch, strides
from .taps import tap_forward, tap_logit_gradient, tap_source_gradient

LOGIT_AXES = "ncuvhw"


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    _check_device(x)
    for launch in forward_launches(x, logits, y, lse, spec):
        launch.run()


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill those of dx and dlogits that are asked for."""
    _check_device(x)
    for launch in backward_launches(dy, x, logits, lse, dx, dlogits, spec):
        launch.run()


def _check_device(x: Tensor) -> None:
    if x.device.type == "cpu" and isinstance(tap_forward, triton.JITFunction):
        raise ValueError("backend 'triton' takes CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1); use backend 'cpu'")


def _sizes(x: Tensor, logits: Tensor, spec: Spec) -> dict[str, int]:
    _, c, h, w = x.shape
    size = {"G": spec.groups, "C": c // spec.groups, "H": h, "W": w, "HO": spec.output_size(h), "WO": spec.output_size(w)}
    return size | {"HQ": logits.shape[4], "WQ": logits.shape[5]}


def _constants(x: Tensor, spec: Spec) -> dict[str, int | str]:
    options = {"K": spec.kernel_size, "UP": spec.up, "DOWN": spec.down, "NORMALIZER": spec.normalizer}
    return options | {"AXIS": 0 if is_channels_last(x) else 1, "BLOCK_M": 32, "BLOCK_C": 32}


def _blocks(n: int, groups: int, locations: int, block: int) -> tuple[int, int, int]:
    # one axis: only the first may exceed 65535 programs
    return (n * groups * -(-locations // block), 1, 1)


def forward_launches(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> list[Launch]:
    """Launches that fill y and lse; arguments as for `forward`, on any device, "meta" included."""
    constants = _constants(x, spec)
    tensors = {"x_ptr": x, "logits_ptr": logits, "y_ptr": y, "lse_ptr": lse}
    steps = strides("x", x, "nchw") | strides("l", logits, LOGIT_AXES) | strides("y", y, "nchw")
    targets = logits.shape[2:].numel()
    grid = _blocks(len(x), spec.groups, targets, constants["BLOCK_M"])
    return [Launch(tap_forward, grid, tensors | _sizes(x, logits, spec) | steps, constants, num_warps=4, num_stages=2)]


def backward_launches(
    dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec
) -> list[Launch]:
    """Launches that fill those of dx and dlogits that are given; arguments as for `backward`, on any device, "meta" included."""
    constants = _constants(x, spec)
    sizes = _sizes(x, logits, spec)
    given = {"logits_ptr": logits, "lse_ptr": lse, "dy_ptr": dy}
    steps = strides("l", logits, LOGIT_AXES) | strides("dy", dy, "nchw")
    launches = []
    if dlogits is not None:
        arguments = {"x_ptr": x} | given | {"dlogits_ptr": dlogits} | sizes | strides("x", x, "nchw") | steps
        arguments |= strides("dl", dlogits, LOGIT_AXES)
        grid = _blocks(len(x), spec.groups, logits.shape[2:].numel(), constants["BLOCK_M"])
        launches.append(Launch(tap_logit_gradient, grid, arguments, constants, num_warps=4, num_stages=2))
    if dx is not None:
        arguments = given | {"dx_ptr": dx} | sizes | steps | strides("dx", dx, "nchw")
        grid = _blocks(len(x), spec.groups, x.shape[2:].numel(), constants["BLOCK_M"])
        launches.append(Launch(tap_source_gradient, grid, arguments, constants, num_warps=4, num_stages=2))
    return launches
