"""Plots of a GPU benchmark, drawn from its results.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import style

COLOR = {"ovq": 0, "ovq_torch": 5, "sdpa_flash": 1, "sdpa_cudnn": 2, "sdpa_efficient": 3, "flash_attention_3": 4}


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Plot time and memory by length (a file per shape), decoding by position, and stages against their floor.

    Returns the files written under `out`.
    """
    card = results["machine"].get("accelerator") or results["machine"]["processor"]
    drawn = []
    rows = [row for row in results["measurements"] if row["total_median_ms"] is not None]
    for shape in sorted({(r["batch"] * r["heads"], r["width"], r["num_centroids"]) for r in rows if r["op"] == "ovq"}):
        heads, width, N = shape
        same = [r for r in rows if (r["batch"] * r["heads"], r["width"]) == (heads, width)]
        same = [r for r in same if r["num_centroids"] == N or not r["op"].startswith("ovq")]
        drawn.append(
            _by_length(same, f"{card}: B x H = {heads}, D = {width}, N = {N}", out / f"BH{heads}_D{width}_N{N}.png")
        )
    if results["decode"]:
        drawn.append(_decoding(results["decode"], card, out / "decode.png"))
    if results["stages"]:
        drawn.append(_stages(results["stages"], card, out / "stages.png"))
    return drawn


def _by_length(rows: list[dict[str, Any]], title: str, path: Path) -> Path:
    panels = [("forward + backward (ms)", "total_median_ms", 1.0)]
    if any(row["peak_bytes"] is not None for row in rows):
        panels.append(("peak memory beyond the inputs (GiB)", "peak_bytes", 2.0**30))
    fig, axes = style.figure(len(panels))
    for ax, (what, key, unit) in zip(axes, panels):
        for index, op in enumerate(sorted({row["op"] for row in rows})):
            points = {row["tokens"]: row[key] / unit for row in rows if row["op"] == op and row[key] is not None}
            lengths = sorted(points)
            color = style.color(COLOR.get(op, len(COLOR) + index))
            ax.plot(lengths, [points[t] for t in lengths], "o-", ms=3, color=color, label=op)
        ax.set_yscale("log")
        ax.set_ylabel(what)
        style.token_axis(ax, "tokens")
    axes[0].set_title(title, loc="left")
    style.legend(axes[0])
    return style.save(fig, path)


def _decoding(rows: list[dict[str, Any]], card: str, path: Path) -> Path:
    fig, (ax,) = style.figure()
    for index, op in enumerate(sorted({row["op"] for row in rows})):
        points = sorted((row["position"], row["us_per_token"]) for row in rows if row["op"] == op)
        ax.plot(*zip(*points), "o-", ms=3, color=style.color(index), label=op)
    ax.set_yscale("log")
    ax.set_ylabel("time per token (us)")
    ax.set_title(f"{card}: one decoded token, one layer", loc="left")
    style.token_axis(ax, "position")
    style.legend(ax)
    return style.save(fig, path)


def _stages(rows: list[dict[str, Any]], card: str, path: Path) -> Path:
    fig, (ax,) = style.figure()
    places = range(len(rows))
    ax.bar(places, [row["median_ms"] for row in rows], color=style.color(0), label="measured")
    ax.bar(places, [row["floor_ms"] for row in rows], color=style.color(1), label="floor")
    ax.set_xticks(list(places), [f"{row['stage']}\n{style.short(row['tokens'])}" for row in rows], fontsize=7)
    ax.set_ylabel("time (ms)")
    ax.set_title(f"{card}: stages of a training pass", loc="left")
    style.legend(ax)
    return style.save(fig, path)
