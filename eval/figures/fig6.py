"""Figure 6: PG19 loss by position to 64k tokens, against `sw` on the same documents, and against less context.

    python -m eval.figures.fig6 dry_run=true                 the plan: runs, tokens, minutes
    python -m eval.figures.fig6 scale=cpu                    everything, on this machine
    python -m eval.figures.fig6 scale=gpu part=1             one part of at most nine minutes
    python -m eval.figures.fig6 models=[sw,sw_ovq] seeds=[0] data=memmap 'data.train=[DIR]' tokenizer.model_path=FILE

All models are trained on the same tokens in the same order. Books differ much more from each other than models do, but
at the same positions of the same book that variation cancels. So the second panel averages differences document by
document; its bands are standard errors of the mean over documents, after averaging over the seeds of each. Models also
differ in how well they use the nearest tokens; so the third panel compares each model with itself, on the same tokens,
when it sees only those: what the rest of the context is worth to it.
At CPU scale, models do not learn to copy from text alone. So there every run starts from the weights of a short run
that copies random tokens (experiment=copying), and the first layer of every model but std_att sees 4 tokens: models
differ in the second, which is a window in `sw`, full attention in `sw_nope`, and so on.
Runs are ordinary train.py runs, reused or resumed if they exist. Settings of train.py are passed on to every run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from eval import style
from eval.figures import panels
from eval.figures.declare import PG19, Figure, Model, Options, Panel, Point, Test, capacities, models
from eval.figures.make import make
from eval.paired import Losses, Mean, means_in, paired
from ovq.cli import command
from ovq.config import Config
from ovq.schema import setting

LARGER, LARGER_FIFO, RECENT = "sw_ovq_2048", "sw_fifo_2048", "sw_fifo_128"
OTHER_SIZES = {  # in training, instead of 512 entries; only on text at CPU scale
    LARGER: ("model=sw_ovq", "model.mixers.ovq.num_centroids=2048"),
    LARGER_FIFO: ("model=sw_fifo", "model.mixers.fifo.capacity=2048"),
    RECENT: ("model=sw_fifo", "model.mixers.fifo.capacity=128"),
}
MODELS = ("std_att", "sw_nope", "sw", RECENT, "sw_ovq", LARGER, "sw_vq", "sw_gdn")
CURVES = (
    "Lines are means over documents and seeds; bands are one standard error over documents. A curve that would more "
    "than double the range of an axis runs out of its frame."
)
SMALL = (
    "The first layer of every model but std_att sees 4 tokens, and every run starts from weights trained to copy "
    "random tokens: with neither, models of this size gained nothing from what lies beyond a window, as was found on "
    "the test books (docs/results/fig6/fresh_weights.json). Both choices were made with sw_nope and sw on validation "
    "documents and may favour these models.",
)
ABOUT = {
    LARGER: (f"`{LARGER}` is `sw_ovq` trained with N = 2,048 centroids instead of 512.",),
    RECENT: (
        f"`{RECENT}` is a window of 129 to 256 tokens without positions, which full attention and OVQ do not have "
        "either; `sw`'s window of 128 tokens has rotary positions, so it differs from them in more than reach.",
    ),
    LARGER_FIFO: (f"`{LARGER_FIFO}` is `sw_fifo` trained with 2,048 entries instead of 512.",),
}
GROWN = {"cpu": (2048, 8192)}  # test-time capacities, if not those of the scale
SHOWN_FROM = 64  # tokens; earlier losses are those of title pages
BASE = "sw"  # the model that the others are compared with
FULL = "sw_nope"  # whose gain from context is 100%
SPANS = ((0, 128), (128, 512), (512, 4096), (4096, 16384), (16384, 65536))  # tokens; the table of the caption
WITHHELD = "context withheld"
Curve = tuple[str, int | None]  # model, capacity
V = TypeVar("V")


@dataclass
class Figure6Options(Options):
    length: int = setting(65536, "positions tested in each document", at_least=1)
    documents: int = setting(32, "documents of the test split, at most", at_least=2)
    num_centroids: list[int] | None = setting(
        None,
        "test-time capacities of a dictionary, besides its own; null: those of the scale, but 2048, 8192 at cpu",
        at_least=1,
        empty=True,
    )
    restart: int = setting(
        512, "tokens that predictions see at least, and twice as many at most, where context is withheld", at_least=1
    )


def figure(options: Figure6Options) -> Figure:
    return Figure(
        name="fig6",
        title="Figure 6: PG19 loss by position",
        panels=(Panel(PG19.name, PG19, models_on_text(options.scale, *MODELS), tests_of(options)),),
        seeds={"cpu": 2, "gpu": 2, "paper": 1},
        differs=(
            "The difference to `sw` on the same documents is not in the paper.",
            *(SMALL if options.scale == "cpu" else ()),
        ),
        draw=draw,
        findings=findings,
        about=ABOUT,
        curves=CURVES,
    )


def models_on_text(scale: str, *names: str) -> tuple[Model, ...]:
    """Models with trials of their own. At CPU scale the window of every model's first layer is short, sw's second layer
    has a wider one, and std_att is trained to copy for three times as many steps, which it needs
    (docs/results/fig6/copying.json).
    """
    if scale != "cpu":
        return models(*(name for name in names if name not in OTHER_SIZES))
    special = {
        "sw": Model("sw", ("model=sw", "model.pattern=[sliding_window,wide_window]")),
        "std_att": Model("std_att", first=("trainer.steps=1440", "data.task.short_steps=900")),
        **{name: Model(name, settings) for name, settings in OTHER_SIZES.items()},
    }
    return tuple(special.get(name, Model(name)) for name in names)


def tests_of(options: Figure6Options) -> Callable[[Config, int | None], list[Test]]:
    def tests(cfg: Config, own: int | None) -> list[Test]:
        short = Test(options.length, options.documents, None, WITHHELD, (f"eval.restart={options.restart}",))
        sizes: list[int | None] = [None]
        if cfg.model.name != "sw_fifo":  # there it is the window's length
            sizes = capacities(options, own, GROWN.get(options.scale))
        return [*(Test(options.length, options.documents, size) for size in sizes), short]

    return tests


# --- differences on the same documents --------------------------------------------------------------------------------


def losses(points: list[Point], span: tuple[int, int], test: str = "") -> dict[Curve, Losses]:
    """Curve -> (document, seed) -> mean loss over a span of positions; a bucket counts if it begins there.

    Args:
        test: "", or WITHHELD. Other tests are distinguished by their capacity.
    """
    buckets: list[tuple[tuple[Curve, tuple[int, int]], int, float, int]] = []
    for p in points:
        assert p.index is not None and p.document is not None
        if (p.test == WITHHELD) == (test == WITHHELD):
            buckets.append((((p.model, p.num_centroids), (p.document, p.seed)), p.index, p.value, p.count))
    found: dict[Curve, Losses] = {}
    for (curve, at), loss in means_in(span, buckets).items():
        found.setdefault(curve, {})[at] = loss
    return found


def of_base(of_curve: dict[Curve, Losses], base: str) -> Losses:
    """The losses of the model that others are compared with; empty if it was not tested."""
    return next((of for (model, _), of in of_curve.items() if model == base), {})


def differences(points: list[Point], span: tuple[int, int], base: str = BASE) -> dict[Curve, Mean]:
    """Curve -> its mean difference from `base` at the same seed, over the documents that both were tested on."""
    of_curve = losses(points, span)
    reference = of_base(of_curve, base)
    return {curve: mean for curve, own in of_curve.items() if (mean := paired(own, reference)) is not None}


def worth(points: list[Point], span: tuple[int, int]) -> dict[Curve, Mean]:
    """Curve -> how much its loss rises if it sees only the tokens just before, averaged over documents."""
    whole, part = losses(points, span), losses(points, span, WITHHELD)
    found = {curve: paired(part[curve], own) for curve, own in whole.items() if curve in part}
    return {curve: mean for curve, mean in found.items() if mean is not None}


def shares(points: list[Point], span: tuple[int, int], base: str) -> dict[Curve, str]:
    """Curve -> its gain over `base` as a share of full attention's with the same seeds, "-" where that is not two
    standard errors above zero. Empty if there are no runs of `base` or of full attention."""
    of_curve = losses(points, span)
    reference = of_base(of_curve, base)
    full, found = of_curve.get((FULL, None), {}), {}
    for curve, own in of_curve.items():
        most = paired(reference, {at: loss for at, loss in full.items() if at in own})
        gain = paired(reference, own)
        if curve[0] not in (base, FULL) and most is not None and gain is not None:
            found[curve] = share_of(gain, most)
    return found


def share_of(part: Mean, whole: Mean) -> str:
    return f"{100 * part.value / whole.value:.0f}%" if whole.value > 2 * whole.error else "-"


def findings(points: list[Point]) -> list[str]:
    """Tables: the loss in each span, the difference to `sw` and the share of full attention's gain over each window,
    what the context is worth to each model, and its share of what it is worth to full attention."""
    if not points:
        return []
    spans = [span for span in SPANS if any(p.index is not None and span[0] <= p.index < span[1] for p in points)]
    head = f"| position | {' | '.join(f'{start:,} to {end:,}' for start, end in spans)} |"
    rule = f"| {' | '.join('---' for _ in range(len(spans) + 1))} |"
    names = labels(points)

    def table(cells: dict[str, list[str]]) -> list[str]:
        return ["", head, rule, *(f"| {name} | {' | '.join(of)} |" for name, of in cells.items()), ""]

    def shares_of(what: str, of_curve: dict[Curve, list[str]]) -> list[str]:
        if all(share == "-" for of in of_curve.values() for share in of):
            return []
        title = f"{what} as a share of `{FULL}`'s (- where that is not two standard errors above zero):"
        return [title, *table({names[curve]: of for curve, of in of_curve.items()})]

    def by_curve(of_span: Callable[[list[Point], tuple[int, int]], dict[Curve, V]]) -> dict[Curve, list[V]]:
        found = [of_span(points, span) for span in spans]
        return {curve: [of[curve] for of in found] for curve in names if all(curve in of for of in found)}

    absolute = [losses(points, span) for span in spans]
    documents = len({p.document for p in points})
    relative, context = by_curve(differences), by_curve(worth)
    lines = [
        f"Loss in nats per token by position, mean over {documents} documents and all seeds:",
        *table({name: [f"{fmean(of[curve].values()):.3f}" for of in absolute] for curve, name in names.items()}),
        f"Difference from `{BASE}` on the same documents, mean and its standard error over documents, in thousandths "
        "of a nat; negative is better, **bold** where it is more than two standard errors from zero:",
        *table({names[curve]: [cell_of(mean) for mean in of] for curve, of in relative.items() if curve[0] != BASE}),
    ]
    if of_seeds := by_seed(points, spans):
        lines += ["The same for each training seed:", *table(of_seeds)]
    for base in (BASE, RECENT):
        lines += shares_of(f"The gain over `{base}`", by_curve(partial(shares, base=base)))
    if not context:
        return lines
    lines += [
        "What the context is worth: by how much a model's loss rises where its state is restarted, so that it sees only"
        " the tokens just before (eval.restart), on the same tokens, in thousandths of a nat:",
        *table({names[curve]: [cell_of(mean) for mean in of] for curve, of in context.items()}),
    ]
    full = context.get((FULL, None))
    if full:
        others = {curve: of for curve, of in context.items() if curve[0] not in (BASE, FULL)}
        kept = {curve: [share_of(mean, most) for mean, most in zip(of, full)] for curve, of in others.items()}
        lines += shares_of("The same", kept)
    return lines


def by_seed(points: list[Point], spans: list[tuple[int, int]]) -> dict[str, list[str]]:
    """The differences from `sw` of each training seed, which may vary more than documents do: "curve, seed" -> a cell
    for each span. Empty for a single seed."""
    seeds = sorted({p.seed for p in points})
    if len(seeds) < 2:
        return {}
    of_seed = {seed: [differences([p for p in points if p.seed == seed], span) for span in spans] for seed in seeds}
    return {
        f"{label(curve)}, seed {seed}": [str(of[curve]) for of in found]
        for curve in dict.fromkeys((p.model, p.num_centroids) for p in points if p.model != BASE)
        for seed, found in of_seed.items()
        if all(curve in of for of in found)
    }


def label(curve: Curve) -> str:
    return curve[0] if curve[1] is None else f"{curve[0]}, N = {curve[1]:,}"


def labels(points: list[Point]) -> dict[Curve, str]:
    """Curve -> its label, with its seeds if it lacks some that others have: a mean over fewer seeds is another mean."""
    seeds: dict[Curve, set[int]] = {}
    for p in points:
        if p.test != WITHHELD:
            seeds.setdefault((p.model, p.num_centroids), set()).add(p.seed)
    every = set().union(*seeds.values())
    return {
        curve: label(curve) if own == every else f"{label(curve)} (seed {', '.join(map(str, sorted(own)))})"
        for curve, own in seeds.items()
    }


def cell_of(mean: Mean) -> str:
    rounding = abs(mean.value) < 5e-5  # shown as 0.0
    return f"**{mean}**" if mean.clear and not rounding else str(mean)


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(figure: Figure, points: list[Point]) -> Any:
    """The loss by position, the difference to `sw`, and what the context is worth."""
    tested = any(p.test == WITHHELD for p in points)
    picture, axes = panels.picture_of(3 if tested else 2)
    starts = sorted({p.index for p in points if p.index is not None})
    end = max((p.length for p in points), default=0)
    shown = min(SHOWN_FROM, end // 4)
    buckets = [bucket for bucket in zip(starts, [*starts[1:], end]) if bucket[0] >= shown]
    middles = {bucket: math.sqrt((bucket[0] + 1) * bucket[1]) for bucket in buckets}
    curves = labels(points)
    looks = panels.looks(list(curves), figure.models)
    by_bucket = {middle: losses(points, bucket) for bucket, middle in middles.items()}
    drawn: list[list[float]] = []
    for curve, name in curves.items():
        found = {middle: fmean(of[curve].values()) for middle, of in by_bucket.items() if curve in of}
        axes[0].plot(list(found), list(found.values()), label=name, **looks[curve])
        drawn.append(list(found.values()))
    panels.frame(axes[0], drawn)
    panels_of_means = [(axes[1], differences), *([(axes[2], worth)] if tested else [])]
    for ax, of_span in panels_of_means:
        means = {middle: of_span(points, bucket) for bucket, middle in middles.items()}
        drawn = []
        for curve, name in curves.items():
            at = [(middle, of[curve]) for middle, of in means.items() if curve in of]
            x, y = [middle for middle, _ in at], [1000 * mean.value for _, mean in at]
            error = [1000 * mean.error for _, mean in at]
            ax.plot(x, y, label=name, **looks[curve])
            low, high = [a - e for a, e in zip(y, error)], [a + e for a, e in zip(y, error)]
            ax.fill_between(x, low, high, color=looks[curve]["color"], alpha=0.15, linewidth=0)
            drawn.append([*low, *high])
        panels.frame(ax, drawn)
        ax.set_ylabel("thousandths of a nat per token")
    for length in {point.train_length for point in points}:
        for ax in axes:
            ax.axvline(length, color=panels.GREY, linewidth=0.8, linestyle=":")
    for ax in axes:
        style.token_axis(ax, "position (dotted: training length)")
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_title("loss by position", loc="left")
    axes[1].set_title(f"minus {BASE}'s on the same text, ± s.e.", loc="left")
    if tested:
        axes[2].set_title("what the far context is worth, ± s.e.", loc="left")
    panels.shared_legend(axes)
    return picture


@command(Figure6Options, overrides=True)
def main(options: Figure6Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    return make(figure(options), options, overrides)


if __name__ == "__main__":
    sys.exit(main())
