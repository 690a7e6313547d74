"""Loss by position: mean cross-entropy at each position of held-out documents, far beyond the training context.

    python -m eval.per_position run=runs/cpu_demo context=65536
    torchrun --nproc_per_node 8 -m eval.per_position run=runs/pg19_480m context=65536 documents=32
    torchrun --nproc_per_node 4 -m eval.per_position run=runs/pg19_480m context=1048576 trainer.context_parallel=4

Writes per_position_loss.parquet (every evaluation, in logarithmic and in linear buckets), loss_by_document.parquet and
plots/loss_by_position_*.png to the run folder. A document is its separator followed by its ids. The first `context`
predictions of every document that is long enough are measured, so every position averages over the same documents.
Memory is bounded: see `eval.heldout`.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.sources import DataError
from data.tokenizer import Tokenizer
from eval import loss_table, plot
from eval.heldout import HeldOut
from eval.loss_table import Row
from eval.run_table import changes
from ovq import peers, processes
from ovq.cli import command
from ovq.config import Config
from ovq.errors import ConfigError, TrainingError
from ovq.inference.losses import exp, losses_by_position, losses_with_restarts
from ovq.inference.run import RunOptions, at_capacity
from ovq.model import Transformer
from ovq.processes import World
from ovq.report import figures, reporting
from ovq.schema import setting
from ovq.train.metrics import show_in_wandb, start_wandb

LINEAR_BUCKETS = 32


def log_edges(context: int) -> list[int]:
    """Bucket edges in half-octaves: 0, 1, 2, 3, 4, 6, 8, 11, 16 ... context; the last bucket is never a mere sliver."""
    octaves = range(2 * math.ceil(math.log2(context)))
    inner = {round(2 ** (half / 2)) for half in octaves}
    return [0, *sorted(edge for edge in inner if edge < context / 2**0.25), context]


def linear_edges(context: int) -> list[int]:
    """Edges of 32 buckets of equal width (to within a token); fewer if the context is shorter than 32."""
    return sorted({context * i // LINEAR_BUCKETS for i in range(LINEAR_BUCKETS + 1)})


EDGES = {"log": log_edges, "linear": linear_edges}
# Its index, its mean losses by kind of bucket, its total nats, and the data set of the mixture that it comes from.
Document = tuple[int, dict[str, np.ndarray], float, str]


@dataclass
class Measurement:
    """`by_bucket`: kind of bucket -> mean nats per token, float64 [documents, buckets]; `by_source`: data set of a
    mixture -> mean nats per token; the other fields are totals over all measured tokens."""

    by_bucket: dict[str, np.ndarray]
    documents: int
    tokens: int
    nats: float
    num_bytes: int
    num_words: int
    by_source: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """loss (nats per token), bits_per_byte, perplexity, word_perplexity, loss/NAME for each data set of a mixture,
        and the number of documents.

        word_perplexity = exp(nats / words) over the measured beginnings of documents; words are split at whitespace,
        and a truncated one counts as a whole word. PG19's published numbers cover the whole books of a whole split: see
        `eval.perplexity`.
        """
        results = {"loss": self.nats / self.tokens, "perplexity": exp(self.nats / self.tokens)}
        if self.num_bytes:
            results["bits_per_byte"] = self.nats / math.log(2) / self.num_bytes
        if self.num_words:
            results["word_perplexity"] = exp(self.nats / self.num_words)
        results |= {f"loss/{name}": loss for name, loss in self.by_source.items()}
        return {**results, "documents": float(self.documents)}


def standard_error(means: np.ndarray) -> np.ndarray | None:
    """Standard error of the mean over documents (axis 0): sqrt(sum (x - mean)^2 / (D - 1) / D). None if D = 1."""
    documents = len(means)
    return means.std(axis=0, ddof=1) / math.sqrt(documents) if documents > 1 else None


def measure(
    model: Transformer,
    cfg: Config,
    tokenizer: Tokenizer,
    world: World,
    should_stop: Callable[[], bool],
    *,
    progress: bool = False,
) -> Measurement | None:
    """Run the held-out documents through a model already in evaluation mode. Collective. None if told to stop.

    Args:
        progress: print a line to stderr for each document this process measures.

    Raises:
        ConfigError: as in `at_capacity`, or no document is long enough.
        DataError: the documents cannot be read.
    """
    wanted = cfg.eval
    losses = partial(losses_with_restarts, restart=wanted.restart) if wanted.restart else losses_by_position
    heldout = HeldOut(cfg, tokenizer, wanted.context, wanted.documents)
    done: list[Document] = []  # of this rank
    with at_capacity(model, cfg):
        while excerpts := heldout.round(wanted.batch * world.data.size):
            first = heldout.given - len(excerpts)
            own = range(world.data.rank, len(excerpts), world.data.size)
            rows = [excerpts[i].tokens for i in own]
            # As many rows on every rank, because each costs collective forward passes.
            rows += [excerpts[0].tokens] * (-(-len(excerpts) // world.data.size) - len(rows))
            nats_DT = losses(
                model,
                rows,
                positions=wanted.context,
                piece=wanted.piece,
                device=world.device,
                should_stop=should_stop,
                context=world.context,
            )
            if nats_DT is None:
                return None
            for i, nats_T in zip(own, nats_DT) if world.context.rank == 0 else ():
                means = {kind: bucket_means(nats_T, make(wanted.context)) for kind, make in EDGES.items()}
                done.append((first + i, means, float(nats_T.sum()), excerpts[i].source))
                if progress:
                    print(f"{excerpts[i].title}: loss {nats_T.mean():.4f}", file=sys.stderr, flush=True)
    if not heldout.given:
        raise ConfigError(_none_long_enough(cfg, heldout))
    if heldout.given < wanted.documents and world.is_main:
        print(
            f"eval.documents={wanted.documents}: only {heldout.given} of {heldout.seen} {wanted.split} documents have "
            f"eval.context={wanted.context} tokens, and those are used",
            file=sys.stderr,
        )
    # In document order, whichever rank measured them, so that the sums are the same on any number of ranks.
    everyone = sorted((document for rank in processes.gather_objects(done) for document in rank), key=lambda d: d[0])
    return Measurement(
        {kind: np.stack([means[kind] for _, means, _, _ in everyone]) for kind in EDGES},
        documents=heldout.given,
        tokens=heldout.given * wanted.context,
        nats=math.fsum(nats for _, _, nats, _ in everyone),
        num_bytes=heldout.num_bytes,
        num_words=heldout.num_words,
        by_source={
            name: statistics.fmean(nats for _, _, nats, source in everyone if source == name) / wanted.context
            for name in dict.fromkeys(source for *_, source in everyone if source)
        },
    )


def bucket_means(nats_T: np.ndarray, edges: list[int]) -> np.ndarray:
    """Mean over each bucket [edges[i], edges[i + 1])."""
    return np.add.reduceat(nats_T, edges[:-1]) / np.diff(edges)


def _none_long_enough(cfg: Config, heldout: HeldOut) -> str:
    split = cfg.eval.split
    if not heldout.longest:
        return f"the {split} split holds no text, so there is no loss by position; set data.{split}"
    return (
        f"none of the {heldout.seen} {split} documents has eval.context={cfg.eval.context} tokens, so there is no loss "
        f"by position; the longest has {heldout.longest}: set eval.context to that or less"
    )


def table_rows(measured: Measurement, cfg: Config, run_dir: Path, step: int, changed: str) -> list[Row]:
    """An evaluation as rows of `loss_table`."""
    common = {
        "run": run_dir.resolve().name,
        "step": step,
        "context": cfg.eval.context,
        "num_centroids": cfg.eval.num_centroids,
        "split": cfg.eval.split,
        "changes": changed,
    }
    rows = []
    for kind, make in EDGES.items():
        edges, means = make(cfg.eval.context), measured.by_bucket[kind]
        error = standard_error(means)
        for i, (start, end) in enumerate(zip(edges, edges[1:])):
            bucket = {"buckets": kind, "position_start": start, "position_end": end, "loss": float(means[:, i].mean())}
            stderr = None if error is None else float(error[i])
            rows.append(common | bucket | {"stderr": stderr, "tokens": measured.documents * (end - start)})
    return [{name: row[name] for name in loss_table.SCHEMA.names} for row in rows]


def document_rows(measured: Measurement, cfg: Config, step: int, changed: str) -> list[Row]:
    """An evaluation as rows of `loss_table.BY_DOCUMENT`."""
    wanted, edges = cfg.eval, log_edges(cfg.eval.context)
    common = {
        "step": step,
        "context": wanted.context,
        "num_centroids": wanted.num_centroids,
        "split": wanted.split,
        "restart": wanted.restart,
        "changes": changed,
        "asked": wanted.documents,
    }
    return [
        common | {"document": document, "position_start": start, "position_end": end, "loss": float(loss)}
        for document, losses in enumerate(measured.by_bucket["log"])
        for start, end, loss in zip(edges, edges[1:], losses)
    ]


def evaluate_strictly(
    model: Transformer,
    cfg: Config,
    tokenizer: Tokenizer,
    world: World,
    run_dir: Path | str,
    step: int,
    should_stop: Callable[[], bool],
    *,
    progress: bool = False,
    changed: str = "",
) -> dict[str, float] | None:
    """Like `evaluate`, but raises where nothing can be evaluated.

    Args:
        progress: as in `measure`.
        changed: value of the "changes" column in the tables.

    Raises:
        ConfigError, DataError: as in `measure`.
        OSError: the run folder cannot be written to.
    """
    run_dir = Path(run_dir)
    measured = measure(model, cfg, tokenizer, world, should_stop, progress=progress)
    if measured is None:
        return None
    processes.on_main(lambda: publish(measured, cfg, run_dir, step, changed=changed))
    return measured.summary()


def publish(
    measured: Measurement, cfg: Config, run_dir: Path, step: int, *, changed: str, wandb_step: int | None = None
) -> None:
    """Add an evaluation to the tables of the run folder, then draw it.

    Args:
        changed: value of the "changes" column in the tables.
        wandb_step: step to log the picture under; None for a run reopened after its end.

    Raises:
        OSError: a table cannot be written. The picture is optional: `eval.plot` makes it from the table.
    """
    loss_table.BY_DOCUMENT.write(run_dir, document_rows(measured, cfg, step, changed))
    if cfg.eval.restart is not None:
        return  # context was withheld: the losses only serve for comparison with those of whole documents
    rows = table_rows(measured, cfg, run_dir, step, changed)
    loss_table.write(run_dir, rows)
    wanted = cfg.eval
    picture = run_dir / "plots" / plot.picture_name(wanted.context, wanted.split, wanted.num_centroids, changed)
    again = " ".join(["python -m eval.plot", *map(shlex.quote, (f"runs=[{run_dir}]", f"out={picture}"))])
    with reporting("the plot of the evaluation", again):
        curves = plot.curves_of(
            loss_table.read(run_dir),
            scale="log",
            train_context=cfg.trainer.context,
            key=loss_table.key_of(rows[0]),
        )
        plot.loss_by_position(curves, picture)
        show_in_wandb("loss_by_position", picture, rows, wandb_step)


def evaluate(
    model: Transformer,
    cfg: Config,
    tokenizer: Tokenizer,
    world: World,
    run_dir: Path | str,
    step: int,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Measure loss by position of a model in training and save it to the run folder. Neither unreadable data nor an
    unwritable folder stops the training.

    Collective: all processes must call it, and each calls should_stop equally often.

    Returns:
        Metrics for the log (`Measurement.summary`), even if the table or the picture cannot be written;
        {"documents": 0} if nothing could be evaluated, after printing a line that says why; None if should_stop()
        returned True, in which case the run folder is unchanged.

    Raises:
        TrainingError: there is not enough memory.
    """
    try:
        measured = measure(model, cfg, tokenizer, world, should_stop)
    except (ConfigError, DataError) as error:  # of the data, on every rank
        if world.is_main:
            print(f"no evaluation at step {step}: {error}", file=sys.stderr, flush=True)
        return {"documents": 0.0}
    except torch.OutOfMemoryError:  # perhaps on this rank only, while the others wait for it
        raise TrainingError(
            f"no memory for the evaluation at step {step}, whose checkpoint is saved; the same command continues with "
            f"a smaller eval.batch (now {cfg.eval.batch}) or eval.piece (now {cfg.eval.piece}), or with "
            "eval.at_end=false trainer.eval_every=0"
        ) from None
    if measured is None:
        return None
    if world.is_main:
        run_dir = Path(run_dir)
        with reporting("the tables of the evaluation", f"python -m eval.per_position {shlex.quote(f'run={run_dir}')}"):
            publish(measured, cfg, run_dir, step, wandb_step=step, changed="")
    return measured.summary()


@dataclass
class Options(RunOptions):
    context: int | None = setting(None, "positions measured in each document", at_least=1)
    documents: int | None = setting(None, "maximum number of held-out documents", at_least=1)
    piece: int | None = setting(None, "tokens per forward pass", at_least=1)
    batch: int | None = setting(None, "documents per batch on each rank", at_least=1)
    split: str | None = setting(None, "held-out split", choices=("validation", "test"))


@command(Options, overrides=True, leave=peers.leave)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    with peers.watched(Path(options.run) / "checkpoints"):
        run = options.open(overrides, shares=True, reads=["restart"])
        if run.cfg.logger.name == "wandb" and run.world.is_main:
            start_wandb(run.run_dir, run.cfg)  # reopens the run; closed when this process ends
        changed = changes(overrides, text=True)
        results = evaluate_strictly(
            *(run.model, run.cfg, run.tokenizer, run.world, run.run_dir, run.step),
            should_stop=lambda: False,
            progress=run.world.is_main,
            changed=changed,
        )
        assert results is not None  # nothing could stop it
        if run.world.is_main:
            print(report(run.run_dir, run.cfg, run.step, results, changed))
        processes.shutdown()
    return 0


def report(run_dir: Path, cfg: Config, step: int, results: dict[str, float], changed: str = "") -> str:
    """An evaluation's results by position as text, and the paths they were written to."""
    wanted = cfg.eval
    if wanted.restart is not None:
        found = figures({name: value for name, value in results.items() if name != "documents"})
        return (
            f"{found}\nby position, with at least {wanted.restart} tokens seen: {run_dir / loss_table.BY_DOCUMENT.file}"
        )
    key = (step, wanted.context, wanted.num_centroids, wanted.split, changed)
    rows = [row for row in loss_table.read(run_dir) if loss_table.key_of(row) == key and row["buckets"] == "log"]
    lines = [f"{run_dir} step {step}: {int(results['documents'])} {wanted.split} documents of {wanted.context} tokens"]
    lines.append(figures({name: value for name, value in results.items() if name != "documents"}))
    error = "one document, so without" if results["documents"] == 1 else "+-"
    lines.append(f"{'position':>17}  loss (nats per token), {error} its standard error over documents")
    for row in plot.after_the_first(rows):
        error = "" if row["stderr"] is None else f" +- {row['stderr']:.4f}"
        lines.append(f"{row['position_start']:>8}-{row['position_end']:<8}  {row['loss']:.4f}{error}")
    picture = run_dir / "plots" / plot.picture_name(wanted.context, wanted.split, wanted.num_centroids, changed)
    return "\n".join([*lines, f"{run_dir / loss_table.FILE}", f"{picture}"])


if __name__ == "__main__":
    sys.exit(main())
