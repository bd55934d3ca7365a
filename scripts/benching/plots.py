"""Plots of the times of the operator."""

from pathlib import Path


def plot_times(rows: list[dict], title: str, path: Path) -> None:
    """Plot one bar for each provider and mode on a logarithmic axis."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True)
    for axis, mode in zip(axes, modes, strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        axis.barh([row["provider"] for row in chosen], [row["ms"] for row in chosen])
        axis.set(xscale="log", xlabel="ms", title=mode)
        axis.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path)


def plot_growth(rows: list[dict], title: str, path: Path) -> None:
    """Plot one panel for each varied quantity; dotted lines are proportional to the work."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8, "svg.fonttype": "none"}):
        panels = list(dict.fromkeys(row["varies"] for row in rows))
        figure = Figure(figsize=(2.5 * len(panels), 2.8), layout="constrained")
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for mode, label in (("forward", "forward"), ("both", "forward + backward")):
                chosen = sorted((row["value"], row["ms"]) for row in rows if row["varies"] == panel and row["mode"] == mode)
                axis.plot(*zip(*chosen, strict=True), "o-", markersize=3, label=label)
                # the line passes through the largest value, where constant costs matter least, or through one thread
                at, ms = chosen[0 if panel == "threads" else -1]
                axis.plot(
                    [v for v, _ in chosen],
                    [ms * (at / v if panel == "threads" else v / at) for v, _ in chosen],
                    ":",
                    color="gray",
                    linewidth=1,
                )
            axis.set(xscale="log", yscale="log", xlabel=panel)
        figure.axes[0].set(ylabel="ms")
        figure.axes[0].legend()
        figure.suptitle(title)
        figure.savefig(path)
