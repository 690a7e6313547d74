"""The caption of a figure, in Markdown: what was done, by which command, and how it differs from the paper's."""

from __future__ import annotations

from typing import Any

from eval.figures import search
from eval.figures.declare import Point
from eval.figures.plan import Line, Plan, tokens_of
from ovq.model import widest_window

AT_SCALE = {
    "cpu": "Size: models of two or four layers of width 128 and minutes of training; the paper's have 70M to 480M "
    "parameters.",
    "gpu": "Size: models of eight or sixteen layers of width 512 (at most 70M parameters) and minutes of training; the "
    "paper's have 70M to 480M parameters.",
    "paper": "Size: one of the paper's sizes; the paper's widths, windows, capacities and numbers of tokens are not "
    "known.",
}
ALWAYS = (
    "The formats of the tasks, windows, capacities, the optimiser and the numbers of tokens are this project's own: "
    "the paper's are not known (docs/paper.md).",
)


def caption(
    plan: Plan,
    points: list[Point],
    missing: list[str],
    trials: list[dict[str, Any]],
    machine: dict[str, Any],
    commit: str,
) -> str:
    """The text of caption.md."""
    name, scale = plan.figure.name, plan.scale.name
    seeds = f"seed{'s' if len(plan.seeds) > 1 else ''} {', '.join(map(str, plan.seeds))}"
    some = ", if not missing" if missing else ""
    where = machine.get("accelerator") or machine["processor"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    described = dict.fromkeys(line.measure.described(line.tests[0]) for line in plan.lines)
    tuned = dict.fromkeys(line.subject.tuned for line in plan.lines)
    shown = (*plan.figure.panel_names, *plan.figure.models)
    about = [sentence for shown_with, more in plan.figure.about.items() if shown_with in shown for sentence in more]
    lines = [
        f"# {plan.figure.title}",
        "",
        f"![{plan.figure.title}]({name}.png)",
        "",
        f"Scale {scale}; training {seeds}{some}. {plan.figure.curves} "
        f"All numbers are in [{name}.csv]({name}.csv), and the command of every run in [plan.json](plan.json).",
        "",
        f"- Command: `{machine['command']}`",
        f"- Code: commit {commit}",
        f"- Drawn: {machine['date']}, on {where}, {machine['cores']} cores, torch {machine['torch']}, {threads}",
        *(f"- Tests (in float32): {words}." for words in described),
        "- State sizes assume activations in bf16 and sums in float32.",
        *missing_section(missing),
        *findings_section(plan.figure.findings(points)),
        "",
        "## Models",
        "",
        "| subject | model | parameters | layers | window | N | training length | steps | tokens | learning rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(line) for line in plan.lines),
        "",
        *beginnings(plan),
        *rates_section(plan, trials),
        "",
        "## How this differs from the paper",
        "",
        *(f"- {sentence}" for sentence in (*plan.figure.differs, *about, AT_SCALE[scale], *ALWAYS, *tuned)),
    ]
    return "\n".join(lines) + "\n"


def beginnings(plan: Plan) -> list[str]:
    """Which weights runs start from, if not from fresh ones."""
    found: dict[str, dict[str, list[str]]] = {}  # subject -> (how its runs begin -> models)
    for line in plan.lines:
        if first := line.first:
            of_first = (
                f"on {first.subject.name} (`experiment={first.subject.experiment}`: {first.cfg.trainer.steps:,} steps, "
                f"{tokens_of(first.cfg):,} tokens, learning rate {first.cfg.optim.lr:g})"
            )
            found.setdefault(line.subject.name, {}).setdefault(of_first, []).append(line.model)
    sentences = []
    for subject, ways in found.items():
        usual, *others = sorted(ways, key=lambda way: -len(ways[way]))
        exceptions = [f"for {' and '.join(f'`{model}`' for model in ways[way])}, {way}" for way in others]
        sentences.append(
            f"Every run on {subject}, including trials, starts from the weights of a run of the same model and seed "
            f"{'; '.join([usual, *exceptions])}."
        )
    return [*sentences, *([""] if sentences else [])]


def missing_section(missing: list[str]) -> list[str]:
    return ["", "## Missing", "", *(f"- {what}" for what in missing)] if missing else []


def findings_section(lines: list[str]) -> list[str]:
    return ["", "## Findings", "", *lines] if lines else []


def row(line: Line) -> str:
    """A line of the table of models."""
    cfg, rate = line.cfg, line.rate()
    cells = [
        line.subject.name,
        f"`{line.model}`",
        f"{line.parameters:,}",
        f"{cfg.model.num_layers}: {', '.join(cfg.model.pattern)}",
        widest_window(cfg.model),
        line.own_capacity,
        f"{cfg.trainer.context:,}",
        f"{cfg.trainer.steps:,}",
        f"{tokens_of(cfg):,}",
        "not chosen" if rate is None else f"{rate:g}",
    ]
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def rates_section(plan: Plan, trials: list[dict[str, Any]]) -> list[str]:
    """How learning rates were chosen, and where the grid may not reach far enough."""
    data = " or ".join(dict.fromkeys(line.measure.chosen_on for line in plan.lines))
    text = [
        "## Learning rates",
        "",
        "All models of a panel choose their learning rates from the same grid. Each has the one with the lowest loss "
        f"after a run with seed {search.TRAIN_SEED}, measured at the training length on {data}, which this figure does "
        "not show. All training seeds use the chosen rate. All scores are in [rates.csv](rates.csv).",
        "",
    ]
    for subject in dict.fromkeys(line.subject.name for line in plan.lines):
        lines = [line for line in plan.lines if line.subject.name == subject]
        grid = sorted({rate for line in lines for rate in line.trials})
        steps = sorted({line.trial_cfg.trainer.steps for line in lines if line.own_trials})
        text += [
            f"- {subject}: {', '.join(f'{rate:g}' for rate in grid)}, after "
            f"{' or '.join(f'{number:,}' for number in steps)} steps"
        ]
    edges = [
        line.name
        for line in plan.lines
        if line.own_trials and len(line.trials) > 1 and line.rate() in (min(line.trials), max(line.trials))
    ]
    if edges:
        text += ["", f"At an edge of the grid, so a better rate may lie outside it: {'; '.join(edges)}."]
    if borrowed := [line.name for line in plan.lines if not line.own_trials]:
        text += ["", f"At the rate of the model that they vary, without trials of their own: {'; '.join(borrowed)}."]
    if failed := [f"{t['model']}, {t['subject']} at {t['rate']:g}" for t in trials if t["failed"]]:
        text += ["", f"Trials that failed: {'; '.join(failed)}."]
    return text
