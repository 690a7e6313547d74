"""Figure 6: PG19 loss by position to 64k tokens, and each model's difference to `sw` on the same documents.

    python -m eval.figures.fig6 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig6 scale=cpu                    everything, on this machine
    python -m eval.figures.fig6 scale=gpu part=1             one part of at most nine minutes
    python -m eval.figures.fig6 models=[sw,sw_ovq] seeds=[0] data=memmap 'data.train=[DIR]' tokenizer.model_path=FILE

All models are trained on the same tokens in the same order. Books differ much more from each other than models do; on
the same book, at the same positions, the books cancel. So the second panel averages differences, document by document,
and its bands are standard errors of their mean over documents, the seeds of a document averaged first.
Runs are those of train.py: found again and resumed. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from eval import style
from eval.figures import panels
from eval.figures.declare import PG19, SCALES, Figure, Options, Panel, Point, Test, models
from eval.figures.make import make
from ovq.cli import command
from ovq.config import Config
from ovq.schema import setting

MODELS = models("std_att", "sw_nope", "sw", "sw_ovq", "sw_vq", "sw_gdn")
BASE = "sw"  # what differences are taken to
SPANS = ((0, 128), (128, 512), (512, 4096), (4096, 16384), (16384, 65536))  # tokens; the table of the caption
Curve = tuple[str, int | None]  # model, capacity


@dataclass
class Figure6Options(Options):
    length: int = setting(65536, "positions tested in each document", at_least=1)
    documents: int = setting(32, "documents of the test split, at most", at_least=2)
    num_centroids: list[int] | None = setting(
        None, "test-time capacities of a model with a dictionary, besides its own; null: those of the scale", at_least=1
    )
    search_share: float = setting(
        0.1, "steps of a run that tries a learning rate, as a share of all steps", above=0, at_most=1
    )


def figure(options: Figure6Options) -> Figure:
    return Figure(
        name="fig6",
        title="Figure 6: PG19 loss by position",
        panels=(Panel(PG19.name, PG19, MODELS, tests_of(options)),),
        seeds={"cpu": 2, "gpu": 2, "paper": 1},
        differs=(
            "Trained at the length in the table and tested to 65,536 tokens.",
            "The difference to `sw` on the same documents is not in the paper.",
        ),
        draw=draw,
        findings=findings,
    )


def tests_of(options: Figure6Options) -> Callable[[Config, int | None], list[Test]]:
    def tests(cfg: Config, own: int | None) -> list[Test]:
        chosen = SCALES[options.scale].num_centroids if options.num_centroids is None else options.num_centroids
        capacities = [None] if own is None else [None, *sorted({*chosen} - {own})]
        return [Test(options.length, options.documents, capacity) for capacity in capacities]

    return tests


# --- differences on the same documents --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over `documents` and its standard error, in nats per token."""

    value: float
    error: float
    documents: int


def mean_over_documents(values: dict[int, list[float]]) -> Mean:
    """The mean of the documents' means over seeds; its error from the spread over documents."""
    of_document = [fmean(seeds) for seeds in values.values()]
    spread = stdev(of_document) / math.sqrt(len(of_document)) if len(of_document) > 1 else math.nan
    return Mean(fmean(of_document), spread, len(of_document))


def losses(points: list[Point], span: tuple[int, int]) -> dict[Curve, dict[tuple[int, int], float]]:
    """Curve -> (document, seed) -> mean loss of its positions in a span; buckets count by where they begin."""
    sums: dict[Curve, dict[tuple[int, int], tuple[float, int]]] = {}
    for p in points:
        assert p.index is not None and p.document is not None
        if span[0] <= p.index < span[1]:
            of_curve = sums.setdefault((p.model, p.num_centroids), {})
            nats, count = of_curve.get((p.document, p.seed), (0.0, 0))
            of_curve[p.document, p.seed] = (nats + p.value * p.count, count + p.count)
    return {curve: {at: nats / count for at, (nats, count) in of.items()} for curve, of in sums.items()}


def differences(points: list[Point], span: tuple[int, int], base: str = BASE) -> dict[Curve, Mean]:
    """Curve -> its mean difference to `base` of the same seed, over documents that both were tested with."""
    of_curve = losses(points, span)
    reference = of_curve.get((base, None), {})
    made = {}
    for curve, own in of_curve.items():
        paired: dict[int, list[float]] = {}
        for (document, seed), loss in own.items():
            if (document, seed) in reference:
                paired.setdefault(document, []).append(loss - reference[document, seed])
        if paired:
            made[curve] = mean_over_documents(paired)
    return made


def findings(points: list[Point]) -> list[str]:
    """Tables: the loss in each span, the difference to `sw` with its error, and the share of full attention's gain."""
    if not points:
        return []
    spans = [span for span in SPANS if any(p.index is not None and span[0] <= p.index < span[1] for p in points)]
    head = " | ".join(f"{start:,} to {end:,}" for start, end in spans)
    rule = " | ".join("---" for _ in range(len(spans) + 1))
    absolute, relative, shares = [], [], []
    by_span = [(losses(points, span), differences(points, span)) for span in spans]
    for curve in dict.fromkeys((p.model, p.num_centroids) for p in points):
        cells = [fmean(of[curve].values()) for of, _ in by_span]
        absolute.append(f"| {label(curve)} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
        found = [means.get(curve) for _, means in by_span]
        if curve != (BASE, None) and all(found):
            relative.append(f"| {label(curve)} | {' | '.join(cell_of(mean) for mean in found if mean)} |")
        full = [means.get(("sw_nope", None)) for _, means in by_span]
        if curve[0] not in (BASE, "sw_nope") and all(found) and all(full):
            cells = [mean.value / most.value for mean, most in zip(found, full) if mean and most]
            known = [m is not None and -m.value > 2 * m.error for m in full]
            texts = [f"{100 * cell:.0f}%" if sure else "-" for cell, sure in zip(cells, known)]
            shares.append(f"| {label(curve)} | {' | '.join(texts)} |")
    documents = len({p.document for p in points})
    return [
        f"Loss in nats per token by position, mean over {documents} documents and all seeds:",
        *("", f"| position | {head} |", f"| {rule} |", *absolute, ""),
        f"Difference to `{BASE}` on the same documents, mean and its standard error over documents, in thousandths of "
        "a nat; negative is better, **bold** where it is more than two standard errors from zero:",
        *("", f"| position | {head} |", f"| {rule} |", *relative, ""),
        f"Share of `sw_nope`'s gain over `{BASE}` (- where that gain itself is not two standard errors from zero):",
        *("", f"| position | {head} |", f"| {rule} |", *shares),
    ]


def label(curve: Curve) -> str:
    return curve[0] if curve[1] is None else f"{curve[0]}, N = {curve[1]:,}"


def cell_of(mean: Mean) -> str:
    text = f"{1000 * mean.value:+.1f} ± {1000 * mean.error:.1f}"
    return f"**{text}**" if abs(mean.value) > 2 * mean.error else text


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(figure: Figure, points: list[Point]) -> Any:
    """The loss by position, and the difference to `sw`."""
    picture, axes = panels.picture_of(2)
    starts = sorted({p.index for p in points if p.index is not None})
    buckets = list(zip(starts, [*starts[1:], max((p.length for p in points), default=0)]))
    middles = [math.sqrt((start + 1) * end) for start, end in buckets]
    loss: dict[Curve, list[float]] = {}
    gain: dict[Curve, list[tuple[float, Mean]]] = {}
    for middle, bucket in zip(middles, buckets):
        for curve, of in losses(points, bucket).items():
            loss.setdefault(curve, []).append(fmean(of.values()))
        for curve, mean in differences(points, bucket).items():
            gain.setdefault(curve, []).append((middle, mean))
    looks = panels.looks(list(loss), figure.models)
    for curve, values in loss.items():
        axes[0].plot(middles, values, label=label(curve), **looks[curve])
    for curve, means in gain.items():
        at = [1000 * mean.value for _, mean in means]
        error = [1000 * mean.error for _, mean in means]
        x = [middle for middle, _ in means]
        axes[1].plot(x, at, label=label(curve), **looks[curve])
        low, high = [a - e for a, e in zip(at, error)], [a + e for a, e in zip(at, error)]
        axes[1].fill_between(x, low, high, color=looks[curve]["color"], alpha=0.15, linewidth=0)
    for length in {point.train_length for point in points}:
        for ax in axes:
            ax.axvline(length, color=panels.GREY, linewidth=0.8, linestyle=":")
    for ax in axes:
        style.token_axis(ax, "position in the document (dotted: training length)")
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_title("PG19, loss by position", loc="left")
    axes[1].set_ylabel(f"loss minus that of {BASE} (thousandths of a nat)")
    axes[1].set_title("difference on the same documents, ± standard error", loc="left")
    panels.shared_legend(axes)
    return picture


@command(Figure6Options, overrides=True)
def main(options: Figure6Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
