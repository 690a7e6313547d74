"""What a figure declares: what its models are trained on, how they are tested, and what the scales change.

A figure consists of panels, each with models trained on one subject. Subjects are shared, so that a model shown in two
figures is trained once. Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ovq.config import Config
from ovq.errors import ConfigError
from ovq.schema import one_of, setting


@dataclass(frozen=True)
class Scale:
    """A size of the experiments.

    Args:
        flops_per_s: throughput of one device in training and testing, for time estimates.
        start_minutes: time to start a process and make a model's first step.
        device: what the estimates are for.
        num_centroids: dictionary capacities of tests, besides that of training.
        piece_minutes: maximum duration of a part; None: the figure is not made in parts.
        only_plan: whether the figure's command prints the plan and starts nothing.
    """

    name: str
    flops_per_s: float
    start_minutes: float
    device: str
    num_centroids: tuple[int, ...]
    piece_minutes: float | None = None
    only_plan: bool = False


SCALES = {
    scale.name: scale
    for scale in (
        # A model of four layers of width 128 trains at about 11,000 tokens/s.
        Scale("cpu", 6e10, 0.2, "two CPU cores", (1024, 4096, 16384)),
        # A tenth and two fifths of an H100's dense bf16 peak; neither these nor the start times were measured.
        Scale("gpu", 1e14, 0.5, "one 80 GB GPU", (4096, 16384), piece_minutes=9),
        Scale("paper", 4e14, 2, "one 80 GB GPU", (8192, 16384), only_plan=True),
    )
}


SCALED = {"gpu": ("scale=gpu",), "paper": ("scale=paper",)}


@dataclass(frozen=True)
class Search:
    """How learning rates are chosen, the same for every model of a subject: `rates` is the grid, and `share` the steps
    of a run that tries one of them, as a share of all steps."""

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    share: float = 0.3


@dataclass(frozen=True)
class Subject:
    """What models are trained on: an experiment and changes to it.

    Args:
        search: how learning rates are chosen, at every scale.
        at: further changes at some scales, possibly another experiment.
        first: by scale, the subject on which a run of the same model and seed provides the initial weights.
        shared: prefixes of the command line's settings that runs on the first subject get too.
        tuned: how the settings other than the learning rate were found, for captions.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...] = ()
    search: Search = field(kw_only=True, default=Search())
    at: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SCALED)
    first: Mapping[str, Subject] = field(default_factory=dict)
    shared: tuple[str, ...] = ("model.", "runs_root=")
    tuned: str = (
        "All settings but the learning rate were found with sw_nope and sw_ovq on recall (docs/results/recall), which "
        "may favour them."
    )

    def settings(self, scale: str) -> list[str]:
        """The settings of its runs at a scale, except the model's."""
        return replaced([f"experiment={self.experiment}", *self.overrides], self.at.get(scale, ()))


def replaced(settings: Sequence[str], others: Sequence[str]) -> list[str]:
    """`settings`, without those whose key is in `others`, then `others`."""
    keys = {text.partition("=")[0] for text in others}
    return [*(text for text in settings if text.partition("=")[0] not in keys), *others]


RECALL = Subject("basic recall", "recall_64k")
LOOKUP = Subject("lookup", "lookup", at={})
_KEYS = tuple(f"data.task.{name}" for name in ("occurrences=", "key_", "value_", "filler"))
POSITIONAL = Subject(
    "positional recall",
    "positional_recall",
    first={"cpu": LOOKUP},
    shared=("model.", "runs_root=", *_KEYS),
    tuned="The format of a query, the number of layers and the curriculum were found with sw_nope and one seed, which "
    "may favour it.",
)
_AT_2K = SCALED | {"paper": ("scale=paper", "trainer.context=2048")}
_AT_160 = (
    "trainer.context=160",
    "trainer.global_batch=32",
    "trainer.micro_batch=32",
    "trainer.steps=2400",  # after 800, most seeds have not found the functions
    "data.task.short_steps=0",
)
LABELS = Subject("labels", "labels", at={})
_FORM = tuple(f"data.task.{name}=" for name in ("labels", "dimensions", "values", "distinct"))
REGRESSION_16 = Subject(
    "regression, 16 functions",
    "regression",
    ("data.task.functions=16",),
    search=Search((3e-3, 1e-2), 1.0),  # after fewer steps, sw_ovq prefers 1e-2, which is the worse in the end
    at=_AT_2K,
    first={"cpu": LABELS},
    shared=("model.", "runs_root=", *_FORM),
    tuned="The number of entries and heads, the window of one example and the curriculum were found with sw_nope and "
    "one seed, which may favour it.",
)
REGRESSION_4 = replace(
    REGRESSION_16,
    name="regression, 4 functions",
    overrides=("data.task.functions=4",),
    search=Search((3e-3, 1e-2), 1 / 3),
    at=_AT_2K | {"cpu": _AT_160},
)
OF_REGRESSION = (
    "Dashed grey: what the earlier entries of the same y give without any earlier example; only what is above it was "
    "learned in context (data/tasks/regression.py).",
    "x and y have two entries, so that 32 functions exist: with three or four, sw_nope found no function in 2 to 4 "
    "million tokens (docs/results/fig5/entries.json).",
)
COPYING = Subject("copying", "copying", at={})
PG19 = Subject(
    "PG19",
    "pg19_cpu",
    search=Search((1e-3, 3e-3, 1e-2, 3e-2), 0.1),
    at={"gpu": ("experiment=pg19_gpu",), "paper": ("experiment=pg19_480m",)},
    first={"cpu": COPYING},
    tuned="Tied embeddings and their deviation at the start were chosen with sw, after 100 steps; all other settings "
    "but the learning rate are first choices.",
)
CODE = replace(PG19, name="Python source", experiment="code_cpu", at={})


@dataclass(frozen=True)
class Model:
    """A model as a figure names it.

    Args:
        overrides: the settings that define it; empty: `model=NAME`.
        rate_of: name of the model of the same figure whose trials choose its learning rate; None: its own trials.
        first: changes to the run that provides its initial weights, where there is one (`Subject.first`).
        full_trials: whether its trials are as long as its runs, because shorter ones do not tell rates apart.
    """

    name: str
    overrides: tuple[str, ...] = ()
    rate_of: str | None = None
    first: tuple[str, ...] = ()
    full_trials: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        return self.overrides or (f"model={self.name}",)


def models(*names: str) -> tuple[Model, ...]:
    """Models that are options of configs/model, each with trials of its own."""
    return tuple(Model(name) for name in names)


def variant(name: str, *changes: str) -> Model:
    """sw_ovq with changes (settings of `model`, or of `model.mixers` without their prefix), at sw_ovq's rate."""
    full = [text if text.startswith("model.") else f"model.mixers.{text}" for text in changes]
    return Model(name, ("model=sw_ovq", *full), rate_of="sw_ovq")


@dataclass(frozen=True)
class Test:
    """One test of a trained run.

    Args:
        length: tokens of its sequences, or of the beginnings of its documents.
        amount: minimum number of answers, or maximum number of documents.
        num_centroids: dictionary capacity; None: as trained.
        label: distinguishes tests of a panel that differ in more than length and capacity, as in "16 functions".
        overrides: settings of the task in this test.
    """

    length: int
    amount: int
    num_centroids: int | None = None
    label: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A row of the figure's CSV: one number of the picture, with all that is needed to compare it.

    For generated tasks, `value` is an accuracy in 0 to 1 over `count` answers, `index` what `Task.indices` counts (None
    for all answers), and `floor` the accuracy that needs no context (None if the task does not say). For text, `value`
    is the mean loss in nats per token of `count` positions of a `document`, from position `index` on. `num_centroids`
    is None without a dictionary whose capacity could be changed. The state is that of one sequence of `length` tokens;
    its bytes assume activations in bf16 and sums in float32. `tokens` are those of training.
    """

    figure: str
    panel: str
    test: str
    model: str
    num_centroids: int | None
    seed: int
    length: int
    index: int | None
    document: int | None
    value: float
    count: int
    floor: float | None
    parameters: int
    state_numbers: int
    state_bytes: int
    window: int | None
    pattern: str
    train_length: int
    steps: int
    tokens: int
    rate: float
    task: str
    run: str


@dataclass(frozen=True)
class Panel:
    """Models trained on one subject. `tests` lists the tests of a run, given its config and its own capacity (None: no
    dictionary whose capacity could be changed)."""

    name: str
    subject: Subject
    models: tuple[Model, ...]
    tests: Callable[[Config, int | None], list[Test]]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Args:
        seeds: number of training seeds at each scale.
        differs: sentences for the caption on how the figure differs from the paper's, at any scale.
        draw: draws the picture from all points.
        findings: lines of Markdown for the caption, computed from all points.
        about: further sentences for the caption, by the panel or model with which they are shown.
        curves: a sentence on what lines and bands are.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    seeds: Mapping[str, int]
    differs: tuple[str, ...]
    draw: Callable[[Figure, list[Point]], Any]
    findings: Callable[[list[Point]], list[str]] = lambda points: []
    about: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    curves: str = "Lines are means over a model's seeds; bands span its lowest to its highest seed."

    @property
    def models(self) -> list[str]:
        """The names of all models, in their order."""
        return list(dict.fromkeys(model.name for panel in self.panels for model in panel.models))

    @property
    def panel_names(self) -> list[str]:
        """The names of all panels, in their order."""
        return [panel.name for panel in self.panels]

    def only(self, panels: list[str] | None = None, models: list[str] | None = None) -> Figure:
        """The figure with fewer panels or models; None: all of them.

        Raises:
            ConfigError: a panel or a model that the figure does not have.
        """
        for what, asked, legal in (("panels", panels, self.panel_names), ("models", models, self.models)):
            for name in asked or []:
                if name not in legal:
                    raise ConfigError(f"{what}: '{name}' is not in {self.name}; legal: {', '.join(legal)}")
        shown = [panel for panel in self.panels if panels is None or panel.name in panels]
        chosen = [(panel, tuple(m for m in panel.models if models is None or m.name in models)) for panel in shown]
        return replace(self, panels=tuple(replace(panel, models=kept) for panel, kept in chosen if kept))


@dataclass
class Options:
    """The options of every figure's command."""

    scale: str = one_of(*SCALES, help="size of the experiments; paper only prints the plan")
    dry_run: bool = setting(False, "print the plan (runs, tokens, minutes) and start nothing")
    only_draw: bool = setting(False, "only write the folder, from what has been tested so far")
    part: int | None = setting(None, "do only this part of the plan, from 1 (scale=gpu)", at_least=1)
    panels: list[str] | None = setting(None, "panels to show; null: all of the figure")
    models: list[str] | None = setting(None, "models to show; null: all of the figure")
    seeds: list[int] | None = setting(None, "training seeds; null: as many as the scale has, from 0", at_least=0)
    rates: list[float] | None = setting(None, "learning rates to choose from; null: the subject's own grid", above=0)
    search_share: float | None = setting(
        None, "steps of a trial run, as a share of all steps; null: the subject's own share", above=0, at_most=1
    )
    at_once: int = setting(1, "runs to train at the same time, with an equal share of the cores each", at_least=1)
    records: str | None = setting(
        "docs/results/runs",
        "folder that keeps the results of runs; a run whose results are there is not trained again; null: none",
        writes="folder",
    )
    out: str | None = setting(
        None, "folder of the figure; null: docs/results/FIGURE, or FIGURE_SCALE if not cpu", writes="folder"
    )


@dataclass
class TaskOptions:
    """Options of a figure that tests generated tasks."""

    answers: int = setting(8192, "minimum answers per test, from whole sequences", at_least=1)


@dataclass
class RecallOptions(TaskOptions, Options):
    """All options of a figure that tests recall."""

    lengths: list[int] | None = setting(
        None, "tokens of recall's test sequences; null: training context times 1, 4, 16 ... up to 65536", at_least=1
    )
    num_centroids: list[int] | None = setting(
        None,
        "test-time capacities of a model with a dictionary, besides its own; null: those of the scale",
        at_least=1,
        empty=True,
    )


LONGEST = 65536


def capacities(options: Any, own: int | None, usual: Sequence[int] | None = None) -> list[int | None]:
    """The capacities of the tests (None: as trained) of a model with this own capacity (None: no dictionary). `options`
    have `scale` and `num_centroids`; if the latter is null, the `usual` ones or else those of the scale are tested."""
    chosen = options.num_centroids
    if chosen is None:
        chosen = usual or SCALES[options.scale].num_centroids
    return trained_and(chosen, own)


def trained_and(grown: Sequence[int], own: int | None) -> list[int | None]:
    """None (as trained), then the other capacities if the model has its own one that can be changed."""
    return [None] if own is None else [None, *sorted({*grown} - {own})]


def by_length(options: Any) -> Callable[[Config, int | None], list[Test]]:
    """The tests of recall: every capacity at every length. `options` are a figure's, with `RecallOptions`."""

    def tests(cfg: Config, own: int | None) -> list[Test]:
        context = cfg.trainer.context
        lengths = options.lengths or [length for power in range(20) if (length := context << 2 * power) < LONGEST]
        lengths = sorted({*lengths, *([] if options.lengths else [LONGEST])})
        return [Test(length, options.answers, capacity) for capacity in capacities(options, own) for length in lengths]

    return tests


def by_functions(options: Any, grown: Sequence[int] = ()) -> Callable[[Config, int | None], list[Test]]:
    """The tests of regression: as many examples of each function as in training, for several numbers of functions.

    Args:
        options: a figure's, with `functions` and `TaskOptions`.
        grown: capacities of a model with a dictionary, besides its own.
    """

    def tests(cfg: Config, own: int | None) -> list[Test]:
        trained = cfg.data.task["functions"]
        of_one = max(1, cfg.trainer.context // trained)
        return [
            Test(of_one * number, options.answers, capacity, f"{number} functions", (f"data.task.functions={number}",))
            for capacity in trained_and(grown, own)
            for number in dict.fromkeys(options.functions)
        ]

    return tests
