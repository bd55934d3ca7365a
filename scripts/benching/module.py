"""carafepp-bench module: the time of a CARAFE module and of each of its parts."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from ...kernels import reassemble
from ...kernels.geometry import Spec
from ...models.carafe import CARAFE
from ...models.half_encoder import encode, suits_matrix_units
from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.sites import DTYPES
from .hardware import describe_hardware
from .memory import keep_freed_memory, measure_peak_bytes
from .timing import CLOCKS, time_in_turns

# the parts of a module beside its layers: the layers together, the operator, and the module itself
LAYERS, OPERATOR, WHOLE = "layers", "operator", "module"
PASSES = ("forward", "step")


class PartCalls:
    """The calls of a part of a network on fixed inputs: forward, and forward with backward ("step").

    Args:
        function: the part.
        inputs: its arguments, which need gradients.
        parameters: its parameters.
        dtype: the dtype of autocast; float32 disables it.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor], dtype: torch.dtype):
        self.function, self.inputs, self.dtype = function, inputs, dtype
        self.leaves = [*inputs, *(parameter for parameter in parameters if parameter.requires_grad)]
        self.y = self.forward()
        # the encoder has other widths where it computes gradients
        with self._autocast():
            self.dy = torch.randn_like(self.function(*inputs))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.inputs[0].device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self) -> Tensor:
        """Compute the output without a graph."""
        with torch.no_grad(), self._autocast():
            return self.function(*self.inputs)

    def step(self) -> tuple[Tensor, ...]:
        """Compute the output and the gradients of inputs and parameters."""
        with self._autocast():
            y = self.function(*self.inputs)
        return torch.autograd.grad(y, self.leaves, self.dy)


def encode_content(module: CARAFE, x: Tensor) -> Tensor:
    """Compute the logits of features x [N, C, H, W] as the module's forward does, which on a GPU may be faster than layer by layer."""
    layers = module.channel_compressor, module.compressor_norm, module.content_encoder
    encoded = encode(*layers, x) if suits_matrix_units(x) else None
    return module.logits(x) if encoded is None else encoded[1]


def list_parts(module: CARAFE, x: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, PartCalls]]:
    """Yield the parts of a module by name, each on its inputs for features x [N, C, H, W].

    They are its layers one by one, without those that do nothing; LAYERS, the layers together as the module runs them; OPERATOR; WHOLE.
    """
    current = x
    for name in ("channel_compressor", "compressor_norm", "content_encoder"):
        part = module.get_submodule(name)
        if not isinstance(part, nn.Identity):
            calls = PartCalls(part, [current], list(part.parameters()), dtype)
            yield name, calls
            current = calls.y.detach().requires_grad_()
    yield LAYERS, PartCalls(functools.partial(encode_content, module), [x], list(module.parameters()), dtype)
    yield OPERATOR, PartCalls(functools.partial(reassemble, **module.spec._asdict()), [x, current], [], dtype)
    yield WHOLE, PartCalls(module, [x], list(module.parameters()), dtype)


def measure_parts(
    module: CARAFE,
    shape: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    rounds: int,
    clock: str,
    seconds: float,
    passes: Sequence[str] = PASSES,
) -> dict[str, dict[str, float]]:
    """Time a module and its parts on features of a shape [N, C, H, W], in interleaved rounds.

    Returns:
        The figures of each part and of the whole, "module": "forward" and "step" (forward and backward), median milliseconds of these
        passes; "parameters", the number of those that need gradients; and "peak_mb", the peak memory of the last of the passes beyond the
        inputs.
    """
    x = torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    parts = dict(list_parts(module, x, dtype))
    peaks = {name: measure_peak_bytes(getattr(part, passes[-1]), device) for name, part in parts.items()}
    calls = {(name, mode): getattr(part, mode) for mode in passes for name, part in parts.items()}
    times = time_in_turns(calls, device, rounds, clock=CLOCKS[clock], seconds=seconds, at_least=3)
    return {
        name: {
            **{mode: median(times[name, mode]) for mode in passes},
            "parameters": sum(leaf.numel() for leaf in part.leaves[len(part.inputs) :]),
            "peak_mb": peaks[name] / 1e6,
        }
        for name, part in parts.items()
    }


def bench_module(cfg: DictConfig) -> None:
    """Print the table and write it to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    (dtype,) = look_up("dtype", [cfg.dtype], DTYPES)
    look_up("clock", [cfg.clock], CLOCKS)
    spec = {name: cfg.op[name] for name in Spec._fields}
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    module = CARAFE(cfg.op.shape[1], **spec, **cfg.options).to(cfg.device).to(memory_format=memory_format)
    options: dict[str, Any] = {"device": cfg.device, "rounds": cfg.rounds, "clock": cfg.clock, "seconds": cfg.seconds}
    parts = measure_parts(module, cfg.op.shape, dtype=dtype, memory_format=memory_format, **options)
    layout = "channels_last" if cfg.channels_last else "contiguous"
    print(f"{module.__class__.__name__}({cfg.op.shape[1]}, {module.extra_repr()}) on {list(cfg.op.shape)}")
    print(f"{cfg.dtype}, {layout}, {describe_hardware(cfg.device)}, torch {torch.__version__}, {cfg.clock} time")
    print(f"{'':<20}{'parameters':>12}{'forward ms':>12}{'%':>6}{'+ backward':>12}{'%':>6}{'peak MB':>10}")
    for name, row in parts.items():
        times = "".join(f"{row[mode]:>12.3f}{row[mode] / parts[WHOLE][mode]:>6.0%}" for mode in PASSES)
        print(f"{name:<20}{row['parameters']:>12,}{times}{row['peak_mb']:>10.1f}")
    settings = {"shape": list(cfg.op.shape), **spec, "dtype": cfg.dtype, "layout": layout, "clock": cfg.clock}
    settings |= {"device": describe_hardware(cfg.device), "torch": torch.__version__}
    path = Path(HydraConfig.get().runtime.output_dir) / "module.csv"
    write_csv(path, [{"part": name, **row, **settings} for name, row in parts.items()])
    print(f"written to {path}")
