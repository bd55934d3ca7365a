"""Pictures of where features are reassembled from (paper, Figures 1 and 9)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ..models.regions import Region, trace_regions
from .lettering import Color
from .pictures import enlarge
from .sheets import arrange
from .task import View

# Vermilion sources and a sky-blue ring differ for every kind of colour vision, and both from the grey of a map.
SOURCE: Color = (230, 70, 0)
TARGET: Color = (86, 200, 255)

# Opacity of the source with the largest weight. That of others is the root of their share in it, so that small weights show.
OPACITY = 0.9

# A region is read beside others in a wide figure: the share of a tile that the height of a letter has, and that of a figure in the legend.
TITLE_SHARE, LEGEND_SHARE = 11, 65

NOTE = "The feature at the ring is reassembled from the coloured pixels of each map. The grey of a map is the norm of its features."


def draw_regions(view: View, path: str | Sequence[str], locations: Sequence[tuple[float, float]]) -> Tensor:
    """Draw where the features at each location come from: a row for each location, over the picture and over every map of a path.

    A stronger vermilion means a larger weight, and a ring marks the location. Maps show the norm of their features, in the order of
    computation: the first is the coarsest on an upsampling path and the finest on a downsampling path. The picture shows the weights of the
    first map.

    Args:
        view: the picture, the network and its inputs.
        path: names or patterns of the network's samplers, see `carafepp.models.regions.trace_regions`.
        locations: (down, across), as fractions of the picture.

    Returns:
        Pictures under their titles, [3, height, width] in [0, 1]; `explain_regions` adds the legend.

    Raises:
        ValueError: see `trace_regions`.
    """
    seen = [(down * view.covered[0], across * view.covered[1]) for down, across in locations]
    regions = trace_regions(view.network, view.inputs, path, seen)
    picture = enlarge(view.picture.cpu().clamp(0, 1))
    # grey, so that the sources stand out
    bases = [picture.mean(0, keepdim=True), *(_stretched(_energy(region.features), picture, view) for region in regions)]
    rows = []
    for target, location in enumerate(locations):
        weights = [_stretched(region.weights[target : target + 1], picture, view) for region in regions]
        rows.append([_marked(base, weight, location) for base, weight in zip(bases, [weights[0], *weights], strict=True)])
    titles = ["image", *(_title(region) for region in regions)]
    return arrange(rows, columns=titles, letters=picture.shape[2] // TITLE_SHARE)


def explain_regions(figures: Sequence[Tensor], titles: Sequence[str] = (), caption: str = "") -> Tensor:
    """Arrange figures of `draw_regions` one below the other, with their titles on the left, and a legend and a caption below."""
    size = figures[0].shape[2] // LEGEND_SHARE
    ramp = torch.linspace(0, 1, 8 * size).expand(1, size, -1)
    marks = {
        "target": _make_ring(size),
        "source; its weight, from 0 to the largest in the map": to_pil_image(_shade(torch.full((1, size, 8 * size), 0.6), ramp)),
    }
    return arrange([[figure] for figure in figures], titles=titles, legend=marks, note=f"{NOTE}\n{caption}".rstrip(), letters=size)


def _title(region: Region) -> str:
    height, width = region.weights.shape[1:]
    return f"{height} x {width}\n{f'into {region.module}' if region.module else 'output'}"


def _energy(features: Tensor) -> Tensor:
    """Compute the norm over the channels [C, H, W] -> [1, H, W], stretched to [0, 1]."""
    norm = features.float().norm(dim=0, keepdim=True)
    return (norm - norm.min()) / (norm.max() - norm.min()).clamp(min=1e-12)


def _stretched(values: Tensor, picture: Tensor, view: View) -> Tensor:
    """Enlarge a map [1, h, w] to the size of the picture, by nearest neighbour."""
    height, width = picture.shape[1:]
    whole = [round(side / share) for side, share in zip((height, width), view.covered, strict=True)]
    return F.interpolate(values[None].cpu().float(), whole, mode="nearest-exact")[0, :, :height, :width]


def _shade(grey: Tensor, weights: Tensor) -> Tensor:
    """Mix a grey map [1, H, W] with the colour of sources, by weights [1, H, W] in [0, 1] -> [3, H, W]."""
    return torch.lerp(grey, torch.tensor(SOURCE).view(3, 1, 1) / 255, OPACITY * weights.sqrt())


def _marked(grey: Tensor, weights: Tensor, location: tuple[float, float]) -> Tensor:
    """Draw weights [1, H, W] over a grey map [1, H, W], and a ring at the location."""
    shaded = to_pil_image(_shade(grey, weights.clamp(min=0) / weights.max().clamp(min=1e-12)))
    ring = _make_ring(max(16, max(shaded.size) // 14))
    x, y = (round(part * side) - ring.width // 2 for part, side in zip(location[::-1], shaded.size, strict=True))
    shaded.paste(ring, (x, y), ring)
    return pil_to_tensor(shaded).float() / 255


def _make_ring(size: int) -> Image.Image:
    """Make a ring with black edges on a transparent square of `size` pixels."""
    ring = Image.new("RGBA", (size, size))
    draw, width = ImageDraw.Draw(ring), max(4, size // 5)
    draw.ellipse((0, 0, size - 1, size - 1), outline="black", width=width)
    draw.ellipse((1, 1, size - 2, size - 2), outline=TARGET, width=width - 2)
    return ring
