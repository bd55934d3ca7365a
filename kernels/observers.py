"""Who may have to see a call besides autograd: compilers, modes, transforms, tracers, profilers, tensor subclasses."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

# types of tensors without a dispatch of their own
PLAIN = (Tensor, torch.nn.Parameter)


def is_intercepted() -> bool:
    """Return whether a compiler, mode, transform, tracer or forward-mode level may record a call or replace it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _may_replace_calls()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _may_replace_calls() -> bool:
    """Return whether a mode may replace calls of functions; that of `torch.set_default_device` leaves those with a device as they are."""
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and any([type(torch._C._get_function_stack_at(level)) is not DeviceContext for level in range(depth)])


def is_observed(*tensors: Tensor) -> bool:
    """Return whether anything but autograd in reverse mode may have to see a call on dense tensors, or any of them is not one.

    Without an observer, a call need not pass through PyTorch's dispatcher, which takes longer than the rest of a small call.
    """
    if is_intercepted() or torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        return True
    for tensor in tensors:
        if is_indirect(tensor) or not (tensor.is_cpu or tensor.is_cuda):
            return True
        if tensor.layout is not torch.strided or tensor.is_nested:
            return True
    return False


def is_indirect(tensor: Tensor) -> bool:
    """Return whether only the dispatcher knows the values of a tensor.

    The memory of some tensors holds the negation of their values, or nothing. Gradients that
    `torch.autograd.grad(is_grads_batched=True)` stacks hide their memory, and so do tensors that a transform of torch.func leaves behind.
    """
    return (
        type(tensor) not in PLAIN
        or tensor.is_neg()
        or tensor._is_zerotensor()
        or is_legacy_batchedtensor(tensor)
        or is_functorch_wrapped_tensor(tensor)
    )
