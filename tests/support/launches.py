"""Count the kernels that PyTorch would launch on a GPU for what runs here on a CPU, and the bytes that they read and write.

A dispatch mode sees every operation of PyTorch, of forward and backward, and `count` says how many launches an operation is in eager mode
on a GPU. An operation without an entry is one launch, as elementwise operations, reductions, copies and matrix products are, and moves
its inputs and outputs once. A bias is another launch after a convolution. cuDNN copies a map in half precision whose channels are not a
multiple of 8 to a wider map, or from it; every such copy is a launch.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FREE = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten._unsafe_view, aten.lift_fresh),
}
MULTIPLE = 8  # channels of half precision that a load of 16 bytes holds


def count_bytes(*values: Any) -> int:
    """Return the bytes of all tensors in a nest of containers."""
    return sum(value.numel() * value.element_size() for value in tree_leaves(values) if isinstance(value, Tensor))


class LaunchCounter(TorchDispatchMode):
    """Count launches by operation, and bytes of all operations except those of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        """Number of launches."""
        return self.launches.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and count its launches."""
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in FREE or function.is_view:
            return result
        launches, moved = count(packet, args, result)
        self.launches[str(packet).removeprefix("aten.")] += launches
        self.bytes += moved
        return result


def count_padding(maps: list[Tensor]) -> tuple[int, int]:
    """Return the launches and bytes of copies between maps and maps of a multiple of 8 channels, read and written."""
    unfit = [t for t in maps if t.shape[1] % MULTIPLE and t.element_size() == 2]
    wider = sum(count_bytes(t) * -(-t.shape[1] // MULTIPLE) * MULTIPLE // t.shape[1] for t in unfit)
    return len(unfit), count_bytes(unfit) + wider


def count(packet: Any, args: tuple, result: Any) -> tuple[int, int]:
    """Return the launches of an operation, and the bytes that they read and write."""
    if packet is aten.convolution:
        x, weight, bias, *_ = args
        padding, padded = count_padding([x, result])
        return 1 + padding + (bias is not None), count_bytes(x, weight, result, bias) + padded + (
            2 * count_bytes(result) if bias is not None else 0
        )
    if packet is aten.convolution_backward:
        dy, x, weight, *_, (need_dx, need_dweight, need_dbias) = args
        padding, padded = count_padding([dy, x])
        moved = need_dx * count_bytes(dy, weight, x) + need_dweight * count_bytes(dy, weight, x) + need_dbias * count_bytes(dy)
        return need_dx + need_dweight + need_dbias + padding, moved + padded
    if packet is aten.native_batch_norm:
        # sums, running statistics, and the result
        trained = args[5]
        return (3, count_bytes(args[0]) * 3) if trained else (1, count_bytes(args[0]) * 2)
    if packet is aten.native_batch_norm_backward:
        # sums, and the result
        return 2, count_bytes(args[0]) * 5
    if packet is torch.ops.carafepp.reassemble:
        return 1, 0
    if packet is torch.ops.carafepp.reassemble_backward:
        # zeros in channels that are not read
        _, _, logits, _, _, kernel_size, up, _, groups, *_ = args
        unread = logits.shape[1] - groups * (kernel_size * up) ** 2
        return 1 + (unread > 0), unread * count_bytes(logits) // logits.shape[1]
    return 1, count_bytes(args, result)
