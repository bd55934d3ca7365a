"""The networks of the paper's tables as carafepp-bench measures them: random weights, a fixed load, and the ways to run them."""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from torch import Tensor, nn

from ...models.carafe import CARAFE
from ...tasks.fixed_load import fix_load, list_static_parts, make_truth
from ...tasks.task import Task


def build_network(table: str, row: str, overrides: Sequence[str]) -> Task:
    """Build the task of a row with random weights, in evaluation mode."""
    config = compose("train", overrides=[f"experiment={table}", f"row={table}/{row}", *overrides])
    torch.manual_seed(0)
    task = instantiate(config.task).eval()
    fix_load(task)
    return task


class Graphed(nn.Module):
    """Module that captures a CUDA graph of another module in its first call, and replays it in later calls of the same shapes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward(self, *inputs: Tensor) -> Any:
        """Return the module's outputs for tensors; the next call overwrites them."""
        if self.graph is None:
            self._capture(inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        # cached casts of weights would lie outside the memory of the graph
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            self.inputs = [tensor.clone() for tensor in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.module(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = self.module(*self.inputs)
        self.graph = graph


def replace_parts(task: Task, wrap: Callable[[nn.Module], nn.Module]) -> Task:
    """Return a copy of a task whose network is wrapped; of a detector, its static parts are."""
    task = copy.deepcopy(task)
    for path in list_static_parts(task):
        parent, _, name = path.rpartition(".")
        setattr(task.get_submodule(parent), name, wrap(task.get_submodule(path)))
    return task


class NetworkCalls:
    """The calls of one network on random images, by mode: inference, as it is, compiled or as a CUDA graph, and a training step.

    Args:
        task: the network and its training. The learning rate of its optimizer becomes 0, so that all steps are alike.
        size: height and width of the images.
        batch, step_batch: the number of images of an inference and of a training step.
        device, memory_format: of network and images.
        dtype: the dtype of autocast; float32 disables it.
    """

    def __init__(
        self,
        task: Task,
        size: Sequence[int],
        *,
        batch: int,
        step_batch: int,
        device: str,
        memory_format: torch.memory_format,
        dtype: torch.dtype,
    ):
        self.task = task.to(device, memory_format=memory_format)
        self.device, self.dtype = torch.device(device).type, dtype
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(max(batch, step_batch), 3, *size, generator=generator).to(device, memory_format=memory_format)
        self.images = images[:batch]
        self.batch = images[:step_batch], make_truth(task, images[:step_batch])
        self.optimizer = task.optimizer(task.parameter_groups())
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of mixed precision."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def infer(self, task: Task | None = None) -> Any:
        """Return the predictions for the images."""
        with torch.no_grad(), self.autocast():
            return (task or self.task)(self.images)

    def wrapped(self, wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], Any]:
        """Return an inference in which `wrap` replaces the network, or the static parts of a detector; see `carafepp.tasks.fixed_load`."""
        task = replace_parts(self.task, wrap)
        return lambda: self.infer(task)

    def step(self) -> None:
        """Take a training step: losses, gradients and the optimizer's step. The task must be in training mode."""
        self.optimizer.zero_grad()
        with self.autocast(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to `self.log")
            loss = self.task.training_step(self.batch, 0)
        loss.backward()
        self.optimizer.step()


def record_sites(task: Task, call: Callable[[], object]) -> list[tuple[CARAFE, torch.Size]]:
    """Return the CARAFE modules that a call of a network calls, in order, each with the shape of its features."""
    sites = []

    def record(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, CARAFE)
        sites.append((module, arguments[0].shape))

    handles = [module.register_forward_hook(record) for module in task.modules() if isinstance(module, CARAFE)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return sites
