"""The HTML of `eval.report`: tables and pictures of runs in one file, by the template beside this module."""

from __future__ import annotations

import datetime
import json
import math
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.build import sources_of
from eval import plot, run_labels, style
from eval.paired import Losses, Mean, paired
from eval.run_facts import Facts
from eval.run_table import Row
from ovq import config
from ovq.config import Config
from ovq.config_data import NAMED_SPLITS
from ovq.plan import format_bytes
from ovq.train.metrics import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPANS = ((0, 128), (128, 512), (512, 2048), (2048, 4096), (4096, 16384), (16384, 65536), (65536, 1 << 62))  # tokens
TEMPLATE = "report.html.jinja"


@dataclass
class Picture:
    title: str
    note: str
    svg: str


@dataclass
class Difference:
    """A model against the base, over all seeds that both have; `by_span` has None where nothing can be compared."""

    label: str
    by_span: list[Mean | None]
    note: str = ""


def page(runs: list[Facts], base: Facts, positions: list[int], points: int, command: str, commit: str) -> str:
    """The whole file.

    Args:
        runs: in the order of the table.
        base: the one that the others are compared with.
        positions: those in the table, in tokens.
        points: maximum number for each training curve.
    """
    labels = labels_of(runs)
    spans = spans_of(base)
    evaluated = [at for at in positions if any(run.loss_at(at) for run in runs)]
    differences = differences_to(base, runs, labels, spans)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        title=f"{len(runs)} run{'s' if len(runs) != 1 else ''}",
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=command,
        commit=commit,
        head=head(evaluated),
        rows=[cells(run, label, evaluated) for run, label in zip(runs, labels)],
        pictures=pictures(runs, labels, points),
        base=run_labels.of_all_seeds(labels[runs.index(base)]),
        spans=[f"{start:,} to {min(end, longest(base)):,}" for start, end in spans],
        differences=differences,
        accuracies=accuracies(runs, labels),
        settings=settings_that_differ(runs, labels),
        troubles=[(label, str(run.run_dir), run.status, run.why) for run, label in zip(runs, labels) if run.why],
        missing=missing(runs, labels, positions),
        data=as_json([entry(run, label, points) for run, label in zip(runs, labels)]),
    )


def labels_of(runs: list[Facts]) -> list[str]:
    """For each run the settings in which it differs, as in `eval.plot`; the folder's name if they are unknown."""
    known = [run for run in runs if run.cfg is not None]
    made = run_labels.labels([run.cfg for run in known if run.cfg is not None], [run.run_dir.name for run in known])
    of = dict(zip((id(run) for run in known), made))
    return [of.get(id(run), run.run_dir.name) for run in runs]


# --- tables -----------------------------------------------------------------------------------------------------------


def head(positions: list[int]) -> list[str]:
    return [
        "run",
        "status",
        "step",
        "tokens",
        "parameters",
        "state at 64k",
        "final training loss",
        *(f"loss at {style.short(position)}" for position in positions),
        "evaluated on",
        "tokens/s",
        "peak memory",
    ]


def cells(run: Facts, label: str, positions: list[int]) -> list[str]:
    """A row of the table of runs; unknown values are empty."""

    def shown(value: Any, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    def with_error(found: tuple[float, float | None]) -> str:
        return f"{found[0]:.4f}" + ("" if found[1] is None else f" ± {found[1]:.4f}")

    of = run.cfg.trainer.steps if run.cfg else None
    return [
        label,
        run.status,
        f"{run.step:,}" + ("" if of is None or of == run.step else f" of {of:,}"),
        shown(run.steps[-1]["tokens"] if run.steps else None, "{:,}".format),
        shown(run.parameters, "{:,}".format),
        shown(run.state_bytes, format_bytes),
        shown(run.last_loss(), "{:.4f}".format),
        *(shown(run.loss_at(position), with_error) for position in positions),
        run.evaluated(),
        shown(run.tokens_per_s(), "{:,.0f}".format),
        shown(run.peak_gib(), "{:.2f} GiB".format),
    ]


def accuracies(runs: list[Facts], labels: list[str]) -> tuple[list[str], list[list[str]]] | None:
    """(head, rows) of accuracies in per cent by length; None if no run has any."""
    lengths = sorted({row["length"] for run in runs for row in run.answers})
    if not lengths:
        return None
    rows = []
    for run, label in zip(runs, labels):
        plain = [row for row in run.answers if not row["changes"]]
        newest = max((row["step"] for row in plain), default=None)
        tests: dict[tuple[str, int | None], dict[int, str]] = {}
        for row in (row for row in plain if row["step"] == newest):
            of_length = tests.setdefault((row["settings"], row["num_centroids"]), {})
            of_length[row["length"]] = percent(row)
        several = len({settings for settings, _ in tests}) > 1
        for (settings, capacity), of_length in tests.items():
            parts = [label, *([settings] if several else []), *([] if capacity is None else [f"N = {capacity:,}"])]
            rows.append([", ".join(parts), *(of_length.get(length, "") for length in lengths)])
    return ["run", *(f"{length:,} tokens" for length in lengths)], rows


def percent(row: Row) -> str:
    """'93.1 ± 0.3': an accuracy and its standard error in per cent: over sequences or, with a single one, as if all
    answers were independent."""
    accuracy, error = row["accuracy"], row["standard_error"]
    if error is None:
        error = math.sqrt(accuracy * (1 - accuracy) / max(1, row["answers"]))
    return f"{100 * accuracy:.1f} ± {100 * error:.1f}"


def settings_that_differ(runs: list[Facts], labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row for each setting that is not the same in all runs that have begun."""
    known = [(config.flatten(run.cfg), label) for run, label in zip(runs, labels) if run.cfg is not None]
    keys = sorted({key for values, _ in known for key in values})
    differ = [key for key in keys if len({repr(values.get(key)) for values, _ in known}) > 1]
    rows = [[key, *(str(values.get(key, "")) for values, _ in known)] for key in differ]
    return ["setting", *(label for _, label in known)], rows


def missing(runs: list[Facts], labels: list[str], positions: list[int]) -> list[str]:
    """What the tables lack, and the commands that produce it."""
    lines = []
    for run, label in zip(runs, labels):
        if run.cfg is None or run.cfg.data.kind == "task":
            continue
        lacking = [position for position in positions if run.loss_at(position) is None]
        if lacking:
            lines.append(
                f"{label}: no loss at {', '.join(map(style.short, lacking))}; "
                f"python -m eval.per_position run={run.run_dir} context={max(lacking)}"
            )
    return lines


# --- differences on the same documents --------------------------------------------------------------------------------


def longest(run: Facts) -> int:
    return max((row["position_end"] for row in run.by_document), default=0)


def spans_of(base: Facts) -> list[tuple[int, int]]:
    """The spans in which the base was evaluated."""
    starts = {row["position_start"] for row in base.by_document}
    return [(start, end) for start, end in SPANS if any(start <= at < end for at in starts)]


def same_text(run: Facts, base: Facts) -> str:
    """Why two runs' documents cannot be compared; empty if they can."""
    if not run.by_document:
        return "no losses by document"
    own, other = run.by_document[0], base.by_document[0]
    for name in ("split", "context"):
        if own[name] != other[name]:
            return f"evaluated with another {name}: {own[name]}"
    assert run.cfg is not None and base.cfg is not None
    if run.fingerprint != base.fingerprint:
        return "another tokenizer"
    of, of_base = held_out(run.cfg, own["split"]), held_out(base.cfg, own["split"])
    differ = [key for key in {**of, **of_base} if of.get(key) != of_base.get(key)]
    return f"another {differ[0]}" if differ else ""


def held_out(cfg: Config, split: str) -> dict[str, Any]:
    """The settings that select the text of a held-out split, by their full names."""
    sources = sources_of(cfg)
    used = {name: s for name, s in sources.items() if s.data.kind not in NAMED_SPLITS or getattr(s.data, split)}
    found: dict[str, Any] = {} if "" in sources else {"data.mixture": list(used)}  # which take turns in this order
    for name, source in used.items():
        data = config.to_dict(source)["data"]
        keys = ["kind", split, "path", "config_name", "data_files", "text_field", "revision"]
        if source.data.kind == "memmap" and not data[split]:  # then all splits are in the folders of data.train
            keys.append("train")
        found |= {f"data.mixture.{name}.{key}" if name else f"data.{key}": data[key] for key in keys}
    return found


def differences_to(
    base: Facts, runs: list[Facts], labels: list[str], spans: list[tuple[int, int]]
) -> list[Difference] | None:
    """Differences of each model from the base, over all its seeds together; None if the base has no documents."""
    if not base.by_document:
        return None
    known = [(run, label) for run, label in zip(runs, labels) if run.cfg is not None]
    groups = [
        (label, [known[index][0] for index in members])
        for label, members in run_labels.by_seeds(
            [run.cfg for run, _ in known if run.cfg], [label for _, label in known]
        )
    ]
    own = next(members for _, members in groups if base in members)
    with_base = [run for run in own if not same_text(run, base)]
    made = []
    for label, members in groups:
        if members is own:
            continue
        notes = list(dict.fromkeys(note for run in members if (note := same_text(run, base))))
        usable = [run for run in members if not same_text(run, base)]
        found = [paired(together(usable, span), together(with_base, span)) for span in spans]
        if usable and not any(found):
            notes.append("no seed in common")
        steps, steps_of_base = ({run.by_document[0]["step"] for run in each} for each in (usable, with_base))
        if usable and steps != steps_of_base:
            notes.append(f"evaluated at step {numbers(steps)}, the base at step {numbers(steps_of_base)}")
        made.append(Difference(label, found, "; ".join(notes)))
    return made


def numbers(values: set[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def together(runs: list[Facts], span: tuple[int, int]) -> Losses:
    made: Losses = {}
    for run in runs:
        assert run.cfg is not None
        made |= run.document_losses(span, run.cfg.seed)
    return made


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(runs: list[Facts], labels: list[str], points: int) -> list[Picture]:
    """The pictures for which there is something to draw."""
    made = []
    evaluated = [(run, label) for run, label in zip(runs, labels) if run.evaluation]
    if evaluated:
        curves = [
            plot.Curve(label, run.evaluation, run.cfg.trainer.context if run.cfg else None) for run, label in evaluated
        ]
        texts = sorted({run.evaluated() for run, _ in evaluated})
        note = "Bands are standard errors over documents." + (
            f" Not all runs were evaluated on the same: {'; '.join(texts)}." if len(texts) > 1 else ""
        )
        made.append(Picture("Loss by position", note, svg(lambda path: plot.loss_by_position(curves, path))))
    if any(run.steps for run in runs):
        figure = training_picture(runs, labels, points)
        note = "Means over neighbouring steps."
        made.append(Picture("Training loss", note, svg(lambda path: style.save(figure, path))))
    return made


def training_picture(runs: list[Facts], labels: list[str], points: int) -> Figure:
    fig, (ax,) = style.figure()
    for index, (run, label) in enumerate(zip(runs, labels)):
        if run.steps:
            curve = training_curve(run, points)
            ax.plot(
                [step for step, _ in curve],
                [loss for _, loss in curve],
                label=label,
                color=style.color(index),
                ls=style.line(index),
            )
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (nats per token)")
    style.legend(ax)
    return fig


def training_curve(run: Facts, points: int) -> list[tuple[int, float]]:
    """At most `points` (step, mean loss of the steps around it)."""
    every = math.ceil(len(run.steps) / points)
    mean = plot.running_mean([row["loss"] for row in run.steps], max(every, len(run.steps) // 100))
    chosen = sorted({*range(0, len(mean), every), len(mean) - 1}) if mean else []
    return [(run.steps[i]["step"], mean[i]) for i in chosen][-points:]


def svg(save: Callable[[Path], object]) -> str:
    """A picture as an SVG element, without the parts that refer to other files: prolog, document type and metadata."""
    matplotlib = style.library()
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "picture.svg"
        save(path)
        text = path.read_text()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several pictures share a page, so their ids must differ.
    mark = f"{zlib.crc32(text.encode()):08x}"
    return re.sub(r'((?:\bid="|xlink:href="#|url\(#))', rf"\g<1>s{mark}-", text)


def entry(run: Facts, label: str, points: int) -> dict[str, Any]:
    """A run's numbers, as stored in the file for other programs."""
    return {
        "label": label,
        "run": str(run.run_dir),
        "status": run.status,
        "why": run.why,
        "step": run.step,
        "parameters": run.parameters,
        "state_bytes_at_65536": run.state_bytes,
        "final_training_loss": finite(run.last_loss()),
        "tokens_per_s": finite(run.tokens_per_s()),
        "peak_memory_gib": run.peak_gib(),
        "training": [[step, finite(round(loss, 4))] for step, loss in training_curve(run, points)] if run.steps else [],
        "loss_by_position": [
            [row["position_start"], row["position_end"], finite(row["loss"]), finite(row["stderr"])]
            for row in run.evaluation
        ],
        "accuracy": [
            {name: row[name] for name in ("length", "num_centroids", "changes", "accuracy", "answers")}
            for row in run.answers
        ],
    }


def as_json(value: Any) -> str:
    """JSON that is safe inside an HTML element."""
    return json.dumps(value).replace("</", "<\\/")
