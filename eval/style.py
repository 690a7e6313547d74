"""The look of every plot in the project, and how it is saved: without a display, and atomically.

    fig, (ax,) = style.figure()
    ax.plot(x, y, color=style.color(0), label="sw_ovq")
    style.token_axis(ax, "position")
    style.legend(ax)
    style.save(fig, run_dir / "plots" / "name.png")

Figures are created through matplotlib's object interface, never pyplot: there is no global state and nothing to close.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ovq.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish too, without its faint yellow.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"),
    *("#8B4513", "#6A3D9A", "#808000", "#B22222"),  # for figures with more curves
)
LINES = ("-", "--", ":", "-.")  # advances once the colours are used up
RC = {
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "axes.titlesize": 10,
}
DPI = 160
LONG_LABEL = 24  # characters
ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")  # what `save` can write


def library() -> ModuleType:
    """matplotlib. Its import fails where MPLBACKEND names a backend that is not installed (Jupyter exports its own to
    every process), and nothing here needs one."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    return matplotlib


def figure(panels: int = 1, width: float = 6.8, height: float = 4.2, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes side by side in `rows` rows; width and height are those of each panel, in inches."""
    matplotlib = library()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        columns = -(-panels // rows)
        fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
        return fig, list(fig.subplots(rows, columns, squeeze=False).flat)[:panels]


def color(index: int) -> str:
    """Colour of the index-th curve."""
    return COLORS[index % len(COLORS)]


def line(index: int) -> str:
    """Line style of the index-th curve; combined with the colour it distinguishes 48 curves."""
    return LINES[index // len(COLORS) % len(LINES)]


def token_axis(ax: Axes, label: str, scale: str = "log") -> None:
    """Make x an axis of tokens, with ticks at powers of two ("log") or even steps ("linear"). Call after plotting."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

    if scale == "log":
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MultipleLocator(2 ** max(0, math.ceil(math.log2(max(1.0, ax.dataLim.x1) / 9)))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value))))
    ax.set_xlabel(label)


def legend(ax: Axes) -> None:
    """Add a legend if there is more than one curve; more than six go beside the axes, and long labels below them, where
    they hide no curve."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2:
        return
    if len(labels) > 6:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif max(map(len, labels)) > LONG_LABEL:
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    else:
        ax.legend(frameon=False)


def save(fig: Figure, path: Path | str) -> Path:
    """Write the figure atomically; the suffix (.png, .pdf, .svg) selects the format. Parent folders are created."""
    path, matplotlib = Path(path), library()
    # No date, version or random id in the file, so that the same data give the same bytes.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}.get(path.suffix)
    with replacing(path) as scratch, matplotlib.rc_context({"svg.hashsalt": "ovq"}):
        fig.savefig(scratch, format=path.suffix[1:].lower(), dpi=DPI, metadata=metadata)  # type: ignore[arg-type]
    return path


@functools.cache
def short(number: int) -> str:
    """2048 -> '2k', 65536 -> '64k', 1048576 -> '1M', 3000 -> '3000': only exact multiples are abbreviated."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if number and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
