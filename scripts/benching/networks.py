"""The networks of the paper's tables as carafepp-bench measures them: random weights, a fixed load, and the ways to run them."""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...models.carafe import CARAFE
from ...tasks.classification import Classification
from ...tasks.detection import Detection
from ...tasks.inpainting import Inpainting
from ...tasks.segmentation import Segmentation
from ...tasks.task import Task

# the parts of a detector that torch.compile and CUDA graphs take; the others, proposals and suppression, have shapes that depend on values
STATIC_PARTS = ("model.backbone", "model.roi_heads.box_head", "model.roi_heads.mask_head", "model.roi_heads.mask_predictor")
# standard deviation of the replaced deltas: boxes stay near their anchors
DELTAS = 0.1
# boxes of objects in training: fractions of the side of the image from which they start, and that they cover. All of these 50 train the box
# head and the mask head, about as many as the boxes with an object of a trained detector
BOX_STARTS = (0.02, 0.16, 0.3, 0.44, 0.58)
BOX_SIDES = (0.1, 0.4)


def build_network(table: str, row: str, overrides: Sequence[str]) -> Task:
    """Build the task of a row with random weights, in evaluation mode."""
    config = compose("train", overrides=[f"experiment={table}", f"row={table}/{row}", *overrides])
    torch.manual_seed(0)
    task = instantiate(config.task).eval()
    if isinstance(task, Detection):
        fix_load(task)
    return task


def fix_load(task: Detection) -> None:
    """Fix the values from which a detector computes proposals and detections, so that their number does not depend on its weights.

    The heads compute as always. Then normally distributed numbers replace the values of their outputs, the same for every network, and
    gradients flow as if nothing had been replaced. Proposals, sampled boxes and detections are therefore the same for every network with
    the same anchors and classes.
    """
    for head in (task.model.rpn.head, task.model.roi_heads.box_predictor):
        head.register_forward_hook(replace_values)


@functools.lru_cache(maxsize=64)
def draw_values(shape: torch.Size, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw normally distributed numbers of a standard deviation, the same ones for the same shape."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def replace_values(module: nn.Module, arguments: Any, outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Forward hook of a head with the outputs (scores, deltas of boxes): it replaces their values, and keeps their gradients."""

    def replace(output: Tensor, scale: float) -> Tensor:
        values = draw_values(output.shape, scale, output.dtype, output.device)
        return values + (output - output.detach()) if output.requires_grad else values

    scores, deltas = outputs
    return tree_map(functools.partial(replace, scale=1.0), scores), tree_map(functools.partial(replace, scale=DELTAS), deltas)


def label_images(images: Tensor) -> Tensor:
    """Return the class 0 for images [N, 3, H, W]."""
    return torch.zeros(len(images), dtype=torch.long, device=images.device)


def label_pixels(images: Tensor) -> Tensor:
    """Return the class 0 for every pixel of images [N, 3, H, W]."""
    return torch.zeros_like(images[:, 0], dtype=torch.long)


def make_holes(images: Tensor) -> Tensor:
    """Return masks [N, 1, H, W] of a hole with half the height and width of the images [N, 3, H, W]."""
    height, width = images.shape[2:]
    masks = torch.zeros_like(images[:, :1])
    masks[:, :, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 1
    return masks


def place_objects(images: Tensor) -> list[dict[str, Tensor]]:
    """Return the same objects of class 1, small and large, with boxes and masks, for each of the images [N, 3, H, W]."""
    height, width = images.shape[2:]
    fractions = [(x, y, x + side, y + side) for x in BOX_STARTS for y in BOX_STARTS for side in BOX_SIDES]
    boxes = torch.tensor(fractions, device=images.device) * torch.tensor([width, height, width, height], device=images.device)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8, device=images.device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    labels = torch.ones(len(boxes), dtype=torch.long, device=images.device)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "area": areas, "iscrowd": torch.zeros_like(labels)}
    return [target for _ in images]


TRUTHS: dict[type[Task], Callable[[Tensor], Any]] = {
    Classification: label_images,
    Segmentation: label_pixels,
    Inpainting: make_holes,
    Detection: place_objects,
}


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
    parts = [name for name, _ in task.named_modules() if name in STATIC_PARTS] if isinstance(task, Detection) else ["model"]
    for path in parts:
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
        truth = next(make for kind, make in TRUTHS.items() if isinstance(task, kind))
        self.batch = images[:step_batch], truth(images[:step_batch])
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
        """Return an inference in which `wrap` replaces the network, or the static parts of a detector; see STATIC_PARTS."""
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
