"""What `replace` did: the table of places, and the way back."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.nn as nn

WIDTH = 100
# paths in one line
MOST = 12


@dataclass(frozen=True)
class Replacement:
    """A place that has a sampler.

    Attributes:
        paths: where the module is; several for a shared module.
        before, after: the original layer or call, and what replaces it, in words.
        parameters_before, parameters_after: their numbers of parameters.
        flops_before, flops_after: their FLOPs for the example, summed over its calls, as torch's FLOP counter counts them (interpolation
            and pooling take none); None without an example.
    """

    paths: tuple[str, ...]
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    flops_before: int | None = None
    flops_after: int | None = None

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


@dataclass(frozen=True)
class Left:
    """A place that is not replaced.

    Attributes:
        paths: paths of the module; several for a shared module.
        what: the layer or call, in words.
        reason: why it is not replaced.
    """

    paths: tuple[str, ...]
    what: str
    reason: str

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


@dataclass(repr=False)
class Report:
    """What `carafepp.replace` did; `print` shows it as a table.

    Attributes:
        model: the network with samplers: the given object, except where the root itself had to be rewritten.
        replaced: the places with samplers, in the order of the modules.
        left: the places that are not replaced, with reasons.
        dry_run: whether nothing was changed.
        notes: remarks on the whole.
    """

    model: nn.Module
    replaced: list[Replacement]
    left: list[Left]
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    restore: Callable[[], nn.Module] | None = None

    def undo(self) -> nn.Module:
        """Put the original modules back, which are the same objects, and return the original model. A second call changes nothing."""
        if self.restore is not None:
            self.model = self.restore()
            self.restore = None
        return self.model

    def __repr__(self) -> str:
        lines = []
        if self.replaced:
            title = "would be replaced" if self.dry_run else "replaced"
            head = (title, "before", "after", "K parameters", "MFLOPs")
            lines += format_table([head, *(row_of(place) for place in self.replaced), total_of(self.replaced)])
        else:
            lines.append("nothing replaced")
        # one line for places that are not replaced for the same reason
        grouped: dict[tuple[str, str], list[str]] = {}
        for place in self.left:
            grouped.setdefault((place.what, place.reason), []).extend(path or "the model" for path in place.paths)
        for (what, reason), paths in grouped.items():
            more = [f"{len(paths) - MOST} more"] if len(paths) > MOST else []
            text = f"not replaced: {', '.join([*paths[:MOST], *more])}, {what}: {reason}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
        for note in self.notes:
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="  ")
        return "\n".join(lines)


def row_of(place: Replacement) -> tuple[str, ...]:
    """Return the cells of a place."""
    paths = ", ".join(place.paths) or "the model"
    return paths, place.before, place.after, *costs_of([place])


def total_of(places: Sequence[Replacement]) -> tuple[str, ...]:
    """Return the cells of the last line, which sums the costs."""
    return f"{len(places)} place{'s' * (len(places) != 1)}", "", "", *costs_of(places)


def costs_of(places: Sequence[Replacement]) -> tuple[str, str]:
    """Return the cells of parameters and FLOPs, before and after."""
    before, after = sum(p.parameters_before for p in places), sum(p.parameters_after for p in places)
    # a layer that the example does not reach has none
    flops = [(p.flops_before, p.flops_after) for p in places if p.flops_before is not None and p.flops_after is not None]
    text = f"{sum(b for b, _ in flops) / 1e6:,.1f} > {sum(a for _, a in flops) / 1e6:,.1f}" if flops else ""
    return f"{before / 1e3:,.1f} > {after / 1e3:,.1f}", text


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns, text to the left and the last two to the right; paths are shortened so that lines fit `WIDTH`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = WIDTH - 2 * (len(widths) - 1) - sum(widths[3:])
    # which columns give way, in which order, down to which width
    for column, least in ((2, 15), (1, 21), (0, 20), (1, 10), (2, 10)):
        widths[column] = max(min(widths[column], least), widths[column] - max(0, sum(widths[:3]) - room))
    lines = []
    for row in rows:
        text = [shorten(cell, width).ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join([*text, *numbers]).rstrip())
    return lines


def shorten(text: str, width: int) -> str:
    """Cut a text to a width: the start of a path, whose end tells more, and the end of other text."""
    if len(text) <= width:
        return text
    return f"{text[: width - 2]}.." if " " in text else f"..{text[len(text) - width + 2 :]}"
