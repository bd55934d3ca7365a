"""Networks that `replace` refuses, each with what to do instead."""

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

# the classes of torch that wrap a network; FSDP's second version derives a class from each module
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def check_model(model: nn.Module) -> None:
    """Check that the layers of a network can be replaced.

    Raises:
        TypeError: the model is not a module, or is a TorchScript module.
        ValueError: the model is wrapped for several devices, compiled, quantised, or has parameters without a shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a TorchScript module, whose layers are compiled: replace in the Python module, then script it")
    for path, module in model.named_modules():
        where = f"model.{path}" if path else "model"
        classes = {cls.__name__ for cls in type(module).__mro__}
        wrapper = next((name for name in WRAPPERS if name in classes), None)
        if wrapper:
            raise ValueError(f"{where} is a {wrapper}: replace in the network inside it, then wrap it and build the optimizer")
        if "OptimizedModule" in classes or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} is compiled by torch.compile: replace in the network before compiling it")
        if ".quantized" in type(module).__module__:
            raise ValueError(f"{where} is a quantised {type(module).__name__}: replace in the network before quantising it")
        if any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
            raise ValueError(f"{where} is a {type(module).__name__} without a shape yet: run a forward of the model, then replace")
