"""Pictures of where features are reassembled from (paper, Figures 1 and 9)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_keypoints

from ..models.regions import Region, trace_regions
from .pictures import arrange, caption, enlarge
from .task import View

RED = (1.0, 0.1, 0.1)


def draw_regions(view: View, path: str | Sequence[str], locations: Sequence[tuple[float, float]]) -> Tensor:
    """Draw where the features at each location come from: a row for each location, over the picture and over every map of a path.

    Sources are red, and a stronger red means a larger weight. A green dot marks the location. Maps show the norm of their features, in the
    order of computation: the first is the coarsest on an upsampling path and the finest on a downsampling path. The picture shows the
    weights of the first map in red.

    Args:
        view: the picture, the network and its inputs.
        path: names or patterns of the network's CARAFE modules, see `carafepp.models.regions.trace_regions`.
        locations: (down, across), as fractions of the picture.

    Returns:
        Pictures and captions in a grid, [3, height, width] in [0, 1].

    Raises:
        ValueError: see `trace_regions`.
    """
    seen = [(down * view.covered[0], across * view.covered[1]) for down, across in locations]
    regions = trace_regions(view.network, view.inputs, path, seen)
    picture = enlarge(view.picture.cpu().clamp(0, 1))
    energies = [_stretched(_energy(region.features), picture, view) for region in regions]
    rows = []
    for target, location in enumerate(locations):
        weights = [_stretched(region.weights[target : target + 1], picture, view) for region in regions]
        # grey, so that red stands out
        grey = picture.mean(0, keepdim=True).expand(3, -1, -1)
        row = [caption(_marked(grey, weights[0], location), f"{location[0]:.2f} down, {location[1]:.2f} across")]
        for region, energy, weight in zip(regions, energies, weights, strict=True):
            row.append(caption(_marked(energy.expand(3, -1, -1), weight, location), _title(region)))
        rows.append(row)
    return arrange(rows)


def _title(region: Region) -> str:
    height, width = region.weights.shape[1:]
    return f"{region.module or 'output'}  {height} x {width}"


def _energy(features: Tensor) -> Tensor:
    """Compute the norm over the channels [C, H, W] -> [1, H, W], stretched to [0, 1]."""
    norm = features.float().norm(dim=0, keepdim=True)
    return (norm - norm.min()) / (norm.max() - norm.min()).clamp(min=1e-12)


def _stretched(values: Tensor, picture: Tensor, view: View) -> Tensor:
    """Enlarge a map [1, h, w] to the size of the picture, by nearest neighbour."""
    height, width = picture.shape[1:]
    whole = [round(side / share) for side, share in zip((height, width), view.covered, strict=True)]
    return F.interpolate(values[None].cpu().float(), whole, mode="nearest-exact")[0, :, :height, :width]


def _marked(picture: Tensor, weights: Tensor, location: tuple[float, float]) -> Tensor:
    """Draw weights [1, H, W] in red over a picture [3, H, W], and the location as a dot."""
    opacity = weights.clamp(min=0) / weights.max().clamp(min=1e-12) * 0.9
    shaded = picture + opacity * (torch.tensor(RED).view(3, 1, 1) - picture)
    _, height, width = picture.shape
    dot = torch.tensor([[[location[1] * width, location[0] * height]]])
    pixels = (shaded * 255).round().to(torch.uint8)
    return draw_keypoints(pixels, dot, colors="lime", radius=max(3, max(height, width) // 100)).float() / 255
