"""Tasks of lm-evaluation-harness: table 1 of the paper for a run, or any other of its tasks by name.

    python -m eval.harness run=runs/pg19_480m                                the five tasks of table 1, zero-shot
    python -m eval.harness run=runs/a tasks=[piqa,wikitext] batch=32 limit=100
    python -m eval.harness run=runs/a tasks=[mine] include_path=my_tasks num_centroids=8192 out=mine.json
    torchrun --nproc_per_node 8 -m eval.harness run=runs/pg19_480m

Needs an optional package: pip install -e '.[lm-eval]'. The harness downloads a task's data from the Hugging Face hub,
or reads the files that a task in the folder include_path names.

Prints a line per task: the number of questions, and acc and acc_norm where the task has them, or its own scores, with
standard errors. Each task is saved when it is done, to harness.json in the run folder or to `out`: a list of
evaluations, each with its step, number of parameters, training tokens and dictionary capacity. If an evaluation is
already in the file, its new tasks are added to the old ones. How texts are scored is described in `eval.harness_model`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.build import is_task
from eval import result_list
from eval.run_table import changes
from ovq import peers, processes
from ovq.cli import command
from ovq.errors import ConfigError, one_line
from ovq.files import locked, write_whole
from ovq.inference.run import Run, RunOptions, at_capacity
from ovq.model import count_parameters, own_capacity, state_bytes, widest_window
from ovq.schema import setting

if TYPE_CHECKING:
    from eval.harness_model import HarnessModel, Tasks

TABLE1 = ["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"]
FILE = "harness.json"
Scores = dict[str, Any]  # of a task: {"questions", "fewshot", "version", "metrics": {name: {"value", "stderr"}}}


@dataclass
class Options(RunOptions):
    tasks: list[str] = setting(TABLE1, "tasks, groups or tags of lm-evaluation-harness")
    batch: int = setting(8, "requests per forward pass; it changes scores by rounding only", at_least=1)
    limit: int | None = setting(None, "use only this many questions of each task; null: all", at_least=1)
    include_path: str | None = setting(None, "folder with the YAML files of more tasks", paths=True)
    metadata: str | None = setting(None, "JSON that tasks are given, such as RULER's tokenizer and max_seq_lengths")
    out: str | None = setting(None, "file to write; null: harness.json in the run folder", writes="file")
    piece: int | None = setting(None, "tokens per forward pass", at_least=1)


@command(Options, overrides=True, leave=peers.leave)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    with peers.watched(Path(options.run) / "checkpoints"):
        # Check the options now, not after an hour's work.
        tasks = find(options)
        path = Path(options.out) if options.out else Path(options.run) / FILE
        read(path)
        run = options.open(overrides, own=["batch"], out=options.out and path.parent)
        if is_task(run.cfg):
            raise ConfigError(f"{options.run} was trained on a generated task, whose ids stand for no text")
        results = measure(run, options, tasks, path, changes(overrides))
        if run.world.is_main:
            print(report(results), path, sep="\n")
        processes.shutdown()
    return 0


def find(options: Options) -> Tasks:
    """The manager of the harness's tasks.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task, folder or metadata.
    """
    try:
        from eval.harness_model import find_tasks
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({one_line(error)}); install it with: "
            "pip install -e '.[lm-eval]'"
        ) from None
    if options.include_path and not Path(options.include_path).is_dir():
        raise ConfigError(f"include_path={options.include_path} is not a folder")
    try:
        metadata = dict(json.loads(options.metadata or "{}"))
    except (TypeError, ValueError):
        raise ConfigError(f'metadata={options.metadata} must be a JSON object, like {{"tokenizer": "gpt2"}}') from None
    return find_tasks(options.tasks, options.include_path, metadata)


def measure(run: Run, options: Options, tasks: Tasks, path: Path, changed: str = "") -> dict[str, Scores]:
    """The scores of all tasks, each saved to `path` when it is done. Collective; empty except on rank 0.

    Args:
        changed: value of "changes" in the file.

    Raises:
        ConfigError: a task cannot be loaded, or no layer has a dictionary for eval.num_centroids.
    """
    from eval.harness_model import HarnessModel

    cfg = run.cfg
    model = HarnessModel(
        *(run.model, run.tokenizer, run.world.device),
        batch=options.batch,
        piece=cfg.eval.piece,
        progress=run.world.is_main,
    )
    results: dict[str, Scores] = {}
    with at_capacity(run.model, cfg):
        evaluation = about(run, options, changed)
        for name in options.tasks:
            scores = ask(model, name, tasks, options.limit)
            results |= scores
            if run.world.is_main:
                save(path, evaluation, scores)
    return results


def ask(model: HarnessModel, name: str, tasks: Tasks, limit: int | None = None) -> dict[str, Scores]:
    """The scores of a task, or of each task in a group or tag; empty on ranks other than 0.

    Args:
        limit: questions of each task; None: all.
    """
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(model=model, tasks=[name], task_manager=tasks, limit=limit, log_samples=False)
    return {} if found is None else {task: scores_of(found, task) for task in found["results"]}


def scores_of(found: Any, task: str) -> Scores:
    """A task's entry in the harness's results, where the name of a metric includes its filter, as in "acc,none"."""
    metrics = {}
    for key, value in found["results"][task].items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = found["results"][task].get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else key
            metrics[name] = {"value": value, "stderr": error if isinstance(error, float) else None}
    return {
        "questions": found["n-samples"].get(task, {}).get("effective"),  # None for a group, which has none of its own
        "fewshot": found["n-shot"].get(task),
        "version": found["versions"].get(task),
        "metrics": metrics,
    }


def about(run: Run, options: Options, changed: str) -> dict[str, Any]:
    """What identifies an evaluation: the run, its model as evaluated, and how it is tested."""
    cfg, trainer, model = run.cfg, run.cfg.trainer, run.model
    return {
        "run": run.run_dir.resolve().name,
        "step": run.step,
        "tokens": run.tokens,
        "parameters": count_parameters(model)[0],
        "num_centroids": own_capacity(model),
        "model": cfg.model.name,
        "pattern": ",".join(cfg.model.pattern),
        "window": widest_window(cfg.model),
        "train_context": trainer.context,
        "state_bytes_at_train_context": state_bytes(model, trainer.context, run.world.itemsize),
        "precision": run.world.precision,
        "changes": changed,
        "weights": cfg.eval.weights,
        "limit": options.limit,
        "metadata": options.metadata,
        "include_path": options.include_path,
        "lm_eval": version("lm-eval"),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a file: see `result_list.read`."""
    return result_list.read(path, "tasks", dict, mend="move it away, or name another: out=FILE")


def save(path: Path, evaluation: dict[str, Any], scores: dict[str, Scores]) -> None:
    """Add scores to the tasks of an evaluation in a file, or a new evaluation to the file; whole or not at all."""
    with locked(path.parent, wait=True):
        known = read(path)
        same = [each for each in known if {**each, "tasks": None} == {**evaluation, "tasks": None}]
        if not same:
            known += (same := [{**evaluation, "tasks": {}}])
        same[0]["tasks"] |= scores
        write_whole(path, json.dumps(known, indent=1) + "\n")


def report(results: dict[str, Scores]) -> str:
    """A table: a line per task, a column per metric, "value +- standard error"; acc and acc_norm come first."""
    found = dict.fromkeys(name for scores in results.values() for name in scores["metrics"])
    columns = [name for name in ("acc", "acc_norm") if name in found]
    columns += [name for name in found if name not in columns]
    lines = [["task", "questions", *columns]]
    for task, scores in results.items():
        cells = [shown(scores["metrics"].get(name)) for name in columns]
        lines.append([task, str(scores["questions"] or "-"), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def shown(metric: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if metric is None:
        return "-"
    value, error = metric["value"], metric["stderr"]
    text = f"{value:.4{'f' if abs(value) < 1e4 else 'e'}}" if isinstance(value, float) else str(value)
    return text if error is None else f"{text} +- {error:.4f}"


if __name__ == "__main__":
    sys.exit(main())
