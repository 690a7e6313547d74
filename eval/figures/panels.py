"""How points are drawn: a colour for each model, a line style for each capacity, the mean and range over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eval import style
from eval.figures.declare import Point
from ovq.plan import format_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

WIDTH, HEIGHT = 4.6, 3.8  # inches of a panel
GREY = "#888888"
Curve = dict[float, list[float]]  # x -> y of each seed


def curves(
    points: Iterable[Point], x: Callable[[Point], float | None], y: Callable[[Point], float]
) -> dict[tuple[str, int | None], Curve]:
    """(model, capacity) -> its curve, in the order of the points; those without an x are left out."""
    made: dict[tuple[str, int | None], Curve] = {}
    for point in points:
        at = x(point)
        if at is not None:
            made.setdefault((point.model, point.num_centroids), {}).setdefault(at, []).append(y(point))
    return made


def looks(curves: list[tuple[str, int | None]], models: list[str]) -> dict[tuple[str, int | None], dict[str, Any]]:
    """Colour and line style of each (model, capacity): a colour for each model, a style for each of its capacities."""
    styles: dict[str, int] = {}
    made: dict[tuple[str, int | None], dict[str, Any]] = {}
    for model, capacity in curves:
        number = styles.setdefault(model, 0)
        styles[model] += 1
        colour = style.color(models.index(model))
        made[model, capacity] = {"color": colour, "linestyle": style.LINES[number % len(style.LINES)]}
    return made


def frame(ax: Axes, curves: list[list[float]]) -> None:
    """Set the limits of the y-axis to hold all curves but those that would more than double the range of the others:
    these run out of the frame."""

    def extent(curves: list[list[float]]) -> float:
        return max(map(max, curves)) - min(map(min, curves))

    curves = [curve for curve in curves if curve]
    kept = list(curves)
    while len(kept) > 2:
        others = {number: kept[:number] + kept[number + 1 :] for number in range(len(kept))}
        widest = min(others, key=lambda number: extent(others[number]))
        if extent(kept) <= 2 * extent(others[widest]):
            break
        del kept[widest]
    if len(kept) < len(curves):
        room = 0.08 * extent(kept)
        ax.set_ylim(min(map(min, kept)) - room, max(map(max, kept)) + room)


def plot(ax: Axes, drawn: dict[tuple[str, int | None], Curve], models: list[str]) -> None:
    """Draw curves: the mean over seeds, and a band from the lowest to the highest.

    Args:
        models: all models of the figure, which gives each the same colour in every panel.
    """
    look = looks(list(drawn), models)
    for (model, capacity), curve in drawn.items():
        colour = look[model, capacity]["color"]
        at = sorted(curve)
        mean = [sum(curve[x]) / len(curve[x]) for x in at]
        label = model if capacity is None else f"{model}, N = {capacity:,}"
        ax.plot(at, mean, label=label, marker="o", markersize=2.5, **look[model, capacity])
        low, high = [min(curve[x]) for x in at], [max(curve[x]) for x in at]
        ax.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)


def accuracy_by_length(
    ax: Axes, points: list[Point], models: list[str], title: str, *, capacities: bool = True
) -> None:
    """Accuracy over all answers by the tokens of a sequence; dotted: the training length.

    Args:
        capacities: whether curves are also distinguished by capacity.
    """
    totals = [point for point in points if point.index is None]
    if not capacities:
        totals = [replace(point, num_centroids=None) for point in totals]
    plot(ax, curves(totals, lambda p: p.length, lambda p: 100 * p.value), models)
    for length in {point.train_length for point in totals}:
        ax.axvline(length, color=GREY, linewidth=0.8, linestyle=":")
    style.token_axis(ax, "tokens in the sequence (dotted: in training)")
    finish(ax, title)


def regression(ax: Axes, points: list[Point], models: list[str], title: str) -> None:
    """Accuracy of regression by number of earlier examples, with the accuracy that needs none."""
    plot(ax, curves(points, lambda p: p.index, lambda p: 100 * p.value), models)
    for floor in {p.floor for p in points if p.floor is not None}:
        ax.axhline(100 * floor, color=GREY, linewidth=1, linestyle="--", label="without earlier examples")
    ax.set_xlabel("earlier examples of the function")
    finish(ax, title)


def state_by_length(ax: Axes, points: list[Point], models: list[str], title: str) -> None:
    """Bytes of one sequence's state by its length."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    plot(ax, curves(points, lambda p: p.length, lambda p: p.state_bytes), models)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    style.token_axis(ax, "tokens in the sequence")
    ax.set_title(title, loc="left")


def finish(ax: Axes, title: str) -> None:
    ax.set_ylim(-2, 102)
    ax.set_ylabel("correct answers, %")
    ax.set_title(title, loc="left")


def picture_of(panels: int, rows: int = 1) -> tuple[Picture, list[Axes]]:
    return style.figure(panels, width=WIDTH, height=HEIGHT, rows=rows)


def shared_legend(axes: list[Axes]) -> None:
    """One legend for all panels, beside the last."""
    known: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            known.setdefault(label, handle)
    if known:
        axes[-1].legend(list(known.values()), list(known), frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def note_missing(picture: Picture, missing: list[str]) -> None:
    """List below the panels what is missing from the figure."""
    if missing:
        fits = int(13.5 * picture.get_figwidth())  # characters of this size
        text = textwrap.shorten(f"missing: {'; '.join(missing)}", fits, placeholder=" ... (all in caption.md)")
        picture.supxlabel(text, fontsize=7, color="#B00020")
