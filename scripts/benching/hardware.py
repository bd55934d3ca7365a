"""Description of the device that a bench runs on."""

import contextlib
import platform
from pathlib import Path

import torch


def describe_hardware(device: str) -> str:
    """Return the name of the GPU, or of the processor with the number of threads that PyTorch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        names = (text.split(":", 1)[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name"))
        return f"{next(names)}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
