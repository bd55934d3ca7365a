"""Other implementations of CARAFE, written from their definitions: their layers by their names, and their arithmetic step by step."""

from abc import ABC, abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def sum_windows(x: Tensor, weights: Tensor, scale: int, k: int) -> Tensor:
    """Windows of the map enlarged to the nearest pixel, with taps `scale` apart, under weights [N, k * k, H * scale, W * scale]."""
    large = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padded = F.pad(large, (k // 2 * scale,) * 4)
    rows, columns = large.shape[2:]
    taps = [padded[:, :, i * scale : i * scale + rows, j * scale : j * scale + columns] for i in range(k) for j in range(k)]
    return sum(tap * weights[:, i, None] for i, tap in enumerate(taps))


class Block(nn.Module):
    """Convolution `conv` without bias, norm `bn`, activation `act`."""

    def __init__(self, inputs: int, outputs: int, k: int, act: nn.Module | None, eps: float):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps, momentum=0.03)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Port(nn.Module, ABC):
    """Base: `encode` gives logits [N, k * k * scale**2, H, W], in the order of a pixel shuffle or with the sub-pixel first."""

    scale, k = 2, 5
    sub_pixels_first = False
    normalized = True

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        logits = self.encode(x)
        if self.sub_pixels_first:
            weights = logits.unflatten(1, (self.scale, self.scale, self.k**2))  # [N, dy, dx, taps, H, W]
            weights = weights.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        else:
            weights = F.pixel_shuffle(logits, self.scale)
        return sum_windows(x, weights.softmax(1) if self.normalized else weights, self.scale, self.k)


class BlockPort(Port):
    """comp, enc: the port with batch norms (ReLU), and its descendants in forks of YOLO (SiLU)."""

    def __init__(self, c: int, k_enc: int = 3, k_up: int = 5, c_mid: int = 64, scale: int = 2, act: type = nn.SiLU, eps: float = 1e-3):
        super().__init__()
        self.scale, self.k = scale, k_up
        self.comp = Block(c, c_mid, 1, act(), eps)
        self.enc = Block(c_mid, (scale * k_up) ** 2, k_enc, None, eps)

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(self.comp(x))


class SequentialPort(Port):
    """comp.0, comp.1 and a ReLU; enc with a norm beside it, or without."""

    def __init__(self, c: int, norm: bool):
        super().__init__()
        self.comp = nn.Sequential(nn.Conv2d(c, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.enc = nn.Conv2d(4, 100, 3, padding=1, bias=norm)
        if norm:
            self.bn = nn.BatchNorm2d(100)

    def encode(self, x: Tensor) -> Tensor:
        logits = self.enc(self.comp(x))
        return self.bn(logits) if hasattr(self, "bn") else logits


class PlainPort(Port):
    """Two convolutions under the names of a port."""

    def __init__(self, c: int, compressor: str, encoder: str, k_enc: int = 3, scale: int = 2, k: int = 5):
        super().__init__()
        self.scale, self.k = scale, k
        self.names = compressor, encoder
        self.add_module(compressor, nn.Conv2d(c, 4, 1))
        self.add_module(encoder, nn.Conv2d(4, (scale * k) ** 2, k_enc, padding=k_enc // 2))

    def encode(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


class UnnormalizedPort(PlainPort):
    """The sub-pixel comes first in the encoder's channels, and the weights are used as they are."""

    sub_pixels_first = True
    normalized = False


class SubPixelFirstBlockPort(BlockPort):
    """The port with norms, and the sub-pixel first in the encoder's channels."""

    sub_pixels_first = True


class ProjectedPort(PlainPort):
    """down, encoder, out: with a 1x1 convolution after the sum."""

    def __init__(self, c1: int, c2: int):
        super().__init__(c1, "down", "encoder", k_enc=3, scale=2, k=3)
        self.out = nn.Conv2d(c1, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with random float64 weights and statistics of norms, and switch it to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.double().state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return module.eval()
