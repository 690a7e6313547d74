"""The plan of a figure: the runs that choose learning rates, the runs that it shows, their tests, and all costs.

A line of the plan is a model on a subject. Its runs are named by their settings alone, so that every figure, and
`python train.py` with the same settings, finds the same folders.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from eval.figures import search
from eval.figures.declare import SCALES, Figure, Model, Options, Panel, Scale, Subject, Test, replaced
from eval.figures.measures import Measure, measure_of
from eval.figures.runs import FigureRun
from launch import sweep
from ovq.compose import compose, run_dir_of
from ovq.config import Config, check
from ovq.errors import ConfigError
from ovq.mixers.base import other_capacity
from ovq.model import Transformer, build_model, count_parameters, flops_per_token, own_capacity, state_bytes, state_size

INSTEAD = {
    "experiment": "the figure has its own",
    "model": "use models=[a,b]",
    "seed": "use seeds=[0,1]",
    "optim.lr": "use rates=[0.001,0.01]",
    "run_dir": "use runs_root=FOLDER",
    "init_from": "a figure's runs begin with what its subject says",
    "eval.weights": "figures show the trained weights",
    "eval.num_centroids": "use num_centroids=[1024,4096]",
    "eval.restart": "figures choose it for each test",
}


@dataclass
class Line:
    """A model on a subject: its runs, its tests, and its costs.

    `settings` are those of every run of the line, except its learning rate and seed; they compose to `cfg`, or to
    `trial_cfg` for the shorter runs that try learning rates. If the model takes its learning rate from another line,
    `trials` are that line's, and `own_trials` is False.
    """

    subject: Subject
    model: str
    settings: list[str]
    cfg: Config
    trial_cfg: Config
    network: Transformer  # on the meta device
    own_capacity: int | None
    measure: Measure
    records: Path | None
    first: Line | None = None  # whose runs provide the initial weights; it has no trials and no tests
    own_trials: bool = True
    panels: list[Panel] = field(default_factory=list)
    trials: dict[float, FigureRun] = field(default_factory=dict)  # by learning rate
    finals: dict[tuple[int, float], FigureRun] = field(default_factory=dict)  # by seed and rate, filled on demand
    test_tokens: dict[Test, int] = field(default_factory=dict)  # the most that a test reads

    @property
    def name(self) -> str:
        return f"{self.model}, {self.subject.name}"

    @property
    def parameters(self) -> int:
        return count_parameters(self.network)[0]

    @functools.cached_property
    def tests(self) -> list[Test]:
        """The tests of all panels, each once. Read it only when `panels` is complete."""
        return list(dict.fromkeys(test for panel in self.panels for test in panel.tests(self.cfg, self.own_capacity)))

    def state(self, test: Test) -> tuple[int, int]:
        """(elements, bytes) of the state of a sequence of this test, as in `Point`."""
        with other_capacity(self.network.mixers(), test.num_centroids):
            return state_size(self.network, test.length), state_bytes(self.network, test.length)

    def rate(self) -> float | None:
        """The learning rate that the trials choose, or the experiment's if there are none; None while a trial is
        pending, or if all have failed."""
        return search.best(self.trials) if self.trials else self.cfg.optim.lr

    def final(self, seed: int) -> FigureRun:
        """The run that the figure shows for a training seed. The rate must be known."""
        rate = self.rate()
        assert rate is not None
        if (seed, rate) not in self.finals:  # the rate may change: a trial that had failed may succeed
            self.finals[seed, rate] = run_of(self.settings, self.cfg, rate, seed, self)
        return self.finals[seed, rate]

    def beginning(self, seed: int) -> FigureRun | None:
        """The run whose weights the runs with this seed start from; None: fresh weights."""
        return self.first.final(seed) if self.first else None

    def training_minutes(self, cfg: Config, scale: Scale) -> float:
        flops = flops_per_token(self.network, cfg.trainer.context) * tokens_of(cfg)
        return scale.start_minutes + flops / scale.flops_per_s / 60

    def test_minutes(self, test: Test, scale: Scale) -> float:
        with other_capacity(self.network.mixers(), test.num_centroids):
            flops = flops_per_token(self.network, test.length, training=False)
        return flops * self.test_tokens[test] / scale.flops_per_s / 60


@dataclass(frozen=True)
class Work:
    """A unit of the plan: a run whose weights others start from ("begin"), a trial ("search"), a run of the figure
    ("train") or the tests of one ("test").

    `which` is the learning rate of a trial, else the training seed."""

    stage: str
    line: str
    which: float
    tokens: int
    minutes: float


@dataclass
class Plan:
    """All lines of a figure at a scale, in the order in which it shows them."""

    figure: Figure
    scale: Scale
    options: Options
    lines: list[Line]
    seeds: list[int]

    @functools.cached_property
    def work(self) -> list[Work]:
        """Every unit, in the order in which they are done: rates are chosen before anything is trained with them."""
        made = []
        for line in self.lines:
            if first := line.first:
                minutes = first.training_minutes(first.cfg, self.scale)
                seeds = [*([search.TRAIN_SEED] if line.own_trials else []), *self.seeds]
                made += [Work("begin", line.name, seed, tokens_of(first.cfg), minutes) for seed in seeds]
        for line in self.lines:
            minutes = line.training_minutes(line.trial_cfg, self.scale)
            rates = line.trials if line.own_trials else {}
            made += [Work("search", line.name, rate, tokens_of(line.trial_cfg), minutes) for rate in rates]
        for line in self.lines:
            minutes = line.training_minutes(line.cfg, self.scale)
            made += [Work("train", line.name, seed, tokens_of(line.cfg), minutes) for seed in self.seeds]
        for line in self.lines:
            each = [line.test_minutes(test, self.scale) for test in line.tests]
            minutes = self.scale.start_minutes + sum(each)
            made += [Work("test", line.name, seed, 0, minutes) for seed in self.seeds]
        return made

    def done(self, unit: Work) -> bool:
        """Whether a unit needs no more work."""
        line = next(line for line in self.lines if line.name == unit.line)
        if unit.stage == "begin":
            run = line.beginning(int(unit.which))
            return run is not None and (run.trained_here() or self.needless(line, int(unit.which)))
        if unit.stage == "search":
            return line.trials[unit.which].score() is not None
        if line.rate() is None:
            return False
        run = line.final(int(unit.which))
        return (unit.stage == "train" and run.trained_here()) or all(run.values(test) for test in line.tests)

    def needless(self, line: Line, seed: int) -> bool:
        """Whether all runs that start from the weights of this seed's run are done."""
        if seed == search.TRAIN_SEED:
            # Those that failed, whose loss is infinite, are tried again.
            return all(trial.loss() not in (None, math.inf) for trial in line.trials.values())
        return self.done(Work("train", line.name, seed, 0, 0))

    def parts(self) -> list[list[Work]]:
        """The work in parts of at most `piece_minutes`; a longer unit is spread over as many parts as it needs.

        Raises:
            ConfigError: the scale is not made in parts.
        """
        limit = self.scale.piece_minutes
        if limit is None:
            raise ConfigError(f"part={self.options.part}: scale={self.scale.name} is not made in parts")
        made: list[list[Work]] = []
        spent = limit
        for unit in self.work:
            if spent + unit.minutes > limit:
                made.append([])
                spent = 0.0
            made[-1].append(unit)
            spent += unit.minutes
            while spent > limit:
                made.append([unit])
                spent -= limit
        return made

    def wanted(self) -> set[tuple[str, str, float]]:
        """(stage, line, which) of what this command is to do: everything, one part, or nothing but drawing.

        Raises:
            ConfigError: there is no such part.
        """
        part = self.options.part
        units = [] if self.options.only_draw else self.work
        if part is not None:
            if self.options.only_draw:
                raise ConfigError(f"part={part} does work, and only_draw=true does none; leave one of them out")
            parts = self.parts()
            if part > len(parts):
                raise ConfigError(f"part={part} does not exist; legal: 1 to {len(parts)}")
            units = parts[part - 1]
        return {(unit.stage, unit.line, unit.which) for unit in units}


def make_plan(figure: Figure, options: Options, overrides: list[str]) -> Plan:
    """The plan of a figure; every run is composed, and every test checked to be possible, before anything starts.

    Args:
        overrides: settings that all runs get in addition.

    Raises:
        ConfigError: an illegal setting, one that an option replaces, or a test that the task cannot make.
    """
    for text in overrides:
        if (key := text.partition("=")[0]) in INSTEAD:
            raise ConfigError(f"{text} cannot be given here; {INSTEAD[key]}")
    scale = SCALES[options.scale]
    if scale.name not in figure.seeds:
        raise ConfigError(f"scale={scale.name}: {figure.name} is made at {', '.join(figure.seeds)} only")
    seeds = list(range(figure.seeds[scale.name])) if options.seeds is None else options.seeds
    if search.TRAIN_SEED in seeds:
        raise ConfigError(f"seeds: {search.TRAIN_SEED} is the seed of the runs that choose learning rates; use another")
    figure = figure.only(options.panels, options.models)
    lines: dict[tuple[str, str], Line] = {}
    for panel in figure.panels:
        for model in panel.models:
            named = (panel.subject.name, model.name)
            if named not in lines:
                lines[named] = line_of(panel.subject, model, scale, options, overrides)
            lines[named].panels.append(panel)
    for panel in figure.panels:
        for model in panel.models:
            if model.rate_of is not None:
                source = lines.get((panel.subject.name, model.rate_of))
                if source is None:
                    raise ConfigError(f"models: '{model.name}' takes its rate from '{model.rate_of}'; name that too")
                line = lines[panel.subject.name, model.name]
                line.trials, line.own_trials = source.trials, False
    for line in lines.values():
        line.test_tokens = {test: line.measure.tokens(line.cfg, test) for test in line.tests}
    return Plan(figure, scale, options, list(lines.values()), seeds)


def line_of(
    subject: Subject, model: Model, scale: Scale, options: Options, overrides: list[str], trials: bool = True
) -> Line:
    """The line of a model on a subject; without trials if it has none of its own."""
    settings = [*replaced(subject.settings(scale.name), overrides), *model.settings]
    cfg = compose(settings)
    measure, records = measure_of(cfg), None if options.records is None else Path(options.records)
    with torch.device("meta"):
        network = build_model(cfg.model, measure.vocab_size(cfg))
    capacity = own_capacity(network)
    share = 1.0 if model.full_trials else options.search_share or subject.search.share
    trial_cfg = copy.deepcopy(cfg)
    trial_cfg.trainer.steps = max(1, round(share * cfg.trainer.steps))
    short = [f"trainer.steps={trial_cfg.trainer.steps}"]
    if curriculum := cfg.data.task.get("short_steps"):
        trial_cfg.data.task["short_steps"] = max(1, round(share * curriculum))
        short.append(f"data.task.short_steps={trial_cfg.data.task['short_steps']}")
    trial = replaced(settings, short)
    line = Line(subject, model.name, settings, cfg, trial_cfg, network, capacity, measure, records)
    if first := subject.first.get(scale.name):
        shared = [text for text in overrides if text.startswith(subject.shared)]
        begins = replace(model, overrides=(*model.settings, *model.first))
        line.first = line_of(first, begins, scale, options, shared, trials=False)
        check_vocabulary(line, line.first)
    if trials and model.rate_of is None:
        for rate in options.rates or subject.search.rates:
            line.trials[rate] = run_of(trial, line.trial_cfg, rate, search.TRAIN_SEED, line)
    return line


def check_vocabulary(line: Line, first: Line) -> None:
    """Refuse a text whose tokenizer has another number of ids than the weights that its runs start from."""
    ids, there = (each.measure.vocab_size(each.cfg) for each in (line, first))
    if ids != there:
        raise ConfigError(
            f"tokenizer.model_path: the tokenizer has {ids:,} ids, but runs on {line.subject.name} begin with weights "
            f"for {there:,}; train one with python -m data.train_tokenizer vocab_size={there} ..."
        )


def run_of(settings: list[str], cfg: Config, rate: float, seed: int, line: Line) -> FigureRun:
    """The run of a line with these settings, which compose to `cfg`, and this learning rate and seed; its job is marked
    if it is finished.

    Raises:
        ConfigError: an illegal rate, or the run is finished and was made with other settings.
    """
    settings, cfg = [*settings, f"seed={seed}", f"optim.lr={rate:g}"], copy.deepcopy(cfg)
    cfg.seed, cfg.optim.lr = seed, float(f"{rate:g}")
    if first := line.beginning(seed):
        settings, cfg.init_from.path = [*settings, f"init_from={first.run_dir}"], str(first.run_dir)
    check(cfg)
    job = sweep.Job(settings, cfg, run_dir_of(cfg, settings))
    sweep.mark_finished([job])
    return FigureRun(job, line.measure, line.records)


def tokens_of(cfg: Config) -> int:
    """Tokens that a run trains on."""
    return cfg.trainer.steps * cfg.trainer.global_batch * cfg.trainer.context


# --- the plan as text ------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """A row for each line and stage, with tokens and estimated minutes, then the parts if there are any."""
    rows: dict[tuple[str, str], list[Work]] = {}
    for unit in plan.work:
        rows.setdefault((unit.line, unit.stage), []).append(unit)
    done = {unit for unit in plan.work if plan.done(unit)}
    width = max(len(line.name) for line in plan.lines)

    def row(name: str, stage: str, units: list[Work]) -> str:
        tokens, minutes = sum(unit.tokens for unit in units), sum(unit.minutes for unit in units)
        runs = f"{len(units):>4}  {len(done.intersection(units)):>4}"
        return f"{name:<{width}}  {stage:<6}  {runs}  {f'{tokens:,}' if tokens else '':>13}  {minutes:>8,.1f}"

    lines = [
        f"{plan.figure.name}, scale {plan.scale.name}: estimates for {plan.scale.device}",
        "",
        f"{'model, subject':<{width}}  {'stage':<6}  {'runs':>4}  {'done':>4}  {'tokens':>13}  {'minutes':>8}",
        *(row(name, stage, units) for (name, stage), units in rows.items()),
        row("together", "", plan.work),
    ]
    left = sum(unit.minutes for unit in plan.work if unit not in done)
    lines += ["", f"{left / 60:,.1f} hours of {plan.scale.device} are left"]
    if plan.scale.piece_minutes is not None:
        lines += ["", f"parts of at most {plan.scale.piece_minutes:g} minutes (part=k), in this order:"]
        for number, units in enumerate(plan.parts(), 1):
            minutes = min(plan.scale.piece_minutes, sum(unit.minutes for unit in units))
            first = f"{units[0].stage} {units[0].line} {units[0].which:g}"
            rest = f" and {len(units) - 1} more" if len(units) > 1 else ""
            lines.append(f"  {number:>3}  {minutes:>5.1f} min  {first}{rest}")
    if plan.scale.only_plan:
        lines += ["", "to launch the trials, then the runs with the rate that each model's trials choose:"]
        lines += launches(plan)
    return "\n".join(lines)


def launches(plan: Plan) -> list[str]:
    """The sweeps that train the runs of the plan on a machine with eight GPUs."""
    commands = []
    for line in plan.lines:
        trial = next(iter(line.trials.values()))
        kept = [text for text in trial.job.overrides if not text.startswith("optim.lr=")]
        rates = ",".join(f"{rate:g}" for rate in line.trials)
        seeds = ",".join(map(str, plan.seeds))
        words = "python -m launch.sweep --gpus 8 --per-job 8"
        if line.own_trials:
            commands.append(f"  {words} {' '.join(kept)} optim.lr={rates}")
        commands.append(f"  {words} {' '.join(line.settings)} optim.lr=RATE seed={seeds}")
    return commands
