"""Print the costs of the compiled kernels on an A100 and an H100, as counted by the emulator.

Call: PYTHONPATH=tests/support python tests/kernels/gpu/ptx_costs.py [WORD ...]

A case is one training step of the operator. The words choose the cases whose name contains them all. A case takes seconds to a minute.
docs/performance_kernels.md explains the columns.
"""

import sys
import time

import torch
from carafepp.kernels.geometry import Spec
from ptx_step import training_step

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
UP, DOWN = (256, 25, 42), (256, 50, 84)
# name -> (channels, height, width), options, dtypes
SITES = {
    "up 2, k 5": (UP, Spec(5, up=2), ("float16", "float32")),
    "down 2, k 5": (DOWN, Spec(5, down=2), ("float16", "float32")),
    "up 2, k 3": (UP, Spec(3, up=2), ("float16",)),
    "up 2, k 7": (UP, Spec(7, up=2), ("float16",)),
    "up 2, k 5, C 64": ((64, 25, 42), Spec(5, up=2), ("float16",)),
    "up 2, k 5, groups 4": (UP, Spec(5, up=2, groups=4), ("float16",)),
    "up 2, k 5, 25 x 41": ((256, 25, 41), Spec(5, up=2), ("float16", "float32")),
    "down 2, k 3": (DOWN, Spec(3, down=2), ("float16",)),
    "down 2, k 5, groups 4": (DOWN, Spec(5, down=2, groups=4), ("float16",)),
    "down 2, k 5, 49 x 83": ((256, 49, 83), Spec(5, down=2), ("float16",)),
}
# images that fill a device: their tiles are chosen, and one image is emulated
MANY = 64
HEAD = ["case", "pass", "kernels", "warp instructions", "DRAM / least bytes", "largest bound / DRAM bound", "limited by", "largest error"]


HOPPER = ("up 2, k 5", "down 2, k 5")


def cases():
    """Yield (name, arguments of training_step, capability)."""
    for capability, sites in ((80, SITES), (90, HOPPER)):
        for site in sites:
            size, spec, dtypes = SITES[site]
            for dtype in dtypes:
                for name, memory_format in FORMATS.items():
                    label = f"{site}, {dtype} {name}" + (f", sm_{capability}" if capability != 80 else "")
                    yield label, (1, *size, spec, getattr(torch, dtype), memory_format), capability


def row(case: str, name: str, cost, errors: list[float]) -> str:
    instructions = f"{cost.warp_insts / 1e6:.2f} M"
    cells = [case, name, str(len(cost.stats)), instructions, f"{cost.dram_ratio:.2f}", f"{cost.bound_ratio:.2f}", cost.limiters]
    return "| " + " | ".join([*cells, f"{max(errors):.1e}"]) + " |"


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for name, arguments, capability in cases():
        if all(word in name for word in words):
            start = time.time()
            step = training_step(*arguments, capability=capability, images=MANY)
            print(row(name, "forward", step.forward, [step.errors["y"]]))
            print(row(name, "backward", step.backward, [step.errors["dx"], step.errors["dlogits"]]), flush=True)
            print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
