"""The batch sizes, heights and widths that an exported file takes."""

from collections.abc import Sequence
from typing import NamedTuple

from torch.export import Dim

Range = tuple[int, int]
Size = tuple[int, int, int]  # batch, height, width

# the default; in a map with a side of one pixel, torch.export takes this side for fixed
DEFAULT_BATCH, DEFAULT_SIDE = (1, 8), (128, 1024)


def _read_range(name: str, value: int | Sequence[int]) -> Range:
    ends = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(ends) != 2 or not all(type(end) is int for end in ends) or not 1 <= ends[0] <= ends[1]:
        raise ValueError(f"{name} must be a number, such as {name}=4, or a range, such as {name}=[1,8], of at least 1, got {value!r}")
    return ends[0], ends[1]


def _between(ends: Range, share: float) -> int:
    """Return a number in a range at a share of its length; an odd one if there is one, because few networks have odd strides."""
    low, high = ends
    number = low + int((high - low) * share)
    return number if number % 2 or number == high else number + 1


class Ranges(NamedTuple):
    """What an exported file takes: the least and the greatest batch size, height and width."""

    batch: Range
    height: Range
    width: Range

    def dimensions(self) -> dict[int, Dim]:
        """Name the axes of an input [N, C, H, W] that are not fixed, for `torch.export`."""
        named = zip((0, 2, 3), self._asdict().items(), strict=True)
        return {axis: Dim(name, min=low, max=high) for axis, (name, (low, high)) in named if low < high}

    def example(self) -> Size:
        """Return the size at which a network is traced: none of its sides is at an end, and height and width differ."""
        return min(max(self.batch[0], 2), self.batch[1]), _between(self.height, 1 / 3), _between(self.width, 1 / 4)

    def checked(self) -> list[Size]:
        """List the sizes at which a file is compared with its network: the ends, the example, and a size that is neither."""
        (few, many), (low, high), (narrow, wide) = self
        other = few, _between(self.height, 3 / 5), _between(self.width, 2 / 3)
        sizes = [(few, low, narrow), (many, low, narrow), (few, high, wide), (few, low, wide), other, self.example()]
        return list(dict.fromkeys(sizes))


def read_ranges(
    size: int | Sequence[int] | None,
    height: int | Sequence[int] | None,
    width: int | Sequence[int] | None,
    batch: int | Sequence[int] | None,
) -> Ranges:
    """Read the options of `carafepp-export`.

    Args:
        size: height and width, or one number for both; they are fixed.
        height, width: a number, or the least and the greatest; without `size`, None means DEFAULT_SIDE.
        batch: a number, or the least and the greatest; None means DEFAULT_BATCH.

    Raises:
        ValueError: a value is not a number or range, or `size` is given together with `height` or `width`.
    """
    if size is not None:
        if height is not None or width is not None:
            raise ValueError(f"size={size} fixes height and width: give size, or height and width, not both")
        sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
        if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
            raise ValueError(
                f"size must be one side or [height,width] in pixels, such as size=512 or size=[512,768], got {size!r}; "
                "for a range of sizes give height=[LEAST,GREATEST] and width=[LEAST,GREATEST]"
            )
        height, width = sides
    sides = (_read_range(name, DEFAULT_SIDE if side is None else side) for name, side in (("height", height), ("width", width)))
    return Ranges(_read_range("batch", DEFAULT_BATCH if batch is None else batch), *sides)
