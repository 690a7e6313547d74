"""Needles in a haystack: what a trained run retrieves, by the needle's depth and the length of the text.

    python -m eval.needle run=runs/cpu_demo                                        built-in text, to 64k tokens
    python -m eval.needle run=runs/pg19_150m data=run kinds=[niah_single_1,niah_single_2] lengths=[4096,8192]
    python -m eval.needle run=runs/a data=jsonl 'data.validation=[held-out.jsonl]' num_centroids=8192

The haystack is held-out text of any data set, encoded with the run's tokenizer; the kinds, named after RULER's, are
described in `data.tasks.needle`. Every sequence has exactly the length it is listed under, answer included; nothing is
truncated. The answer gets two scores: `exact`, the share of sequences in which greedy decoding reproduces it token by
token, and `log_p`, the log-probability (nats) of the whole answer.

Writes needle.parquet and needle.csv (a row per kind, length and depth) and plots/needle_*.png (heat maps of both
scores, a panel for each kind) to the run folder. Cells that are already in the table are not measured again, so an
interrupted evaluation continues. With several processes, each runs every sequence on its shard of the model.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from data.build import heldout_documents, is_task
from data.tasks.base import TEST
from data.tasks.needle import KINDS, NeedleTask
from data.tasks.rows import sequences_for_test
from data.tokenizer import Tokenizer
from eval import style
from eval.answers import TEST_SEED, TOKENS_AT_ONCE, predict
from eval.run_table import Row, RunTable, changes, mark
from ovq import peers, processes
from ovq.cli import command
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.inference.run import Run, RunOptions, at_capacity, check_capacity
from ovq.model import count_parameters, state_bytes, state_size, widest_window
from ovq.report import reporting
from ovq.schema import setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HAYSTACK_TOKENS = 1 << 22  # read from the beginning of the split
PARAGRAPH = "\n\n"  # between documents; a separator would tell the model that the text before it has ended
TABLE = RunTable(
    "needle.parquet",
    pa.schema(
        [
            ("run", pa.string()),
            ("step", pa.int64()),
            ("data", pa.string()),  # where the haystack comes from
            ("split", pa.string()),
            ("haystack", pa.string()),  # hash of its tokens
            ("seed", pa.int64()),  # of the sequences
            ("num_centroids", pa.int64()),  # eval.num_centroids; null: as trained
            ("weights", pa.string()),  # trained | ema
            ("changes", pa.string()),  # other settings that differ from the run's
            ("kind", pa.string()),
            ("length", pa.int64()),  # tokens of every sequence, answer included
            ("depth", pa.int64()),  # of the needle that is asked for, % of the haystack
            ("sequences", pa.int64()),
            ("exact", pa.float64()),  # share of sequences, 0 to 1
            ("log_p", pa.float64()),  # of a whole answer, nats; mean over sequences
            ("answer_tokens", pa.float64()),  # mean
            ("model", pa.string()),
            ("pattern", pa.string()),  # of the layers
            ("window", pa.int64()),  # of the sliding-window layers; null: there are none
            ("parameters", pa.int64()),
            ("state_numbers", pa.int64()),  # elements of one sequence's state at this length
            ("state_bytes", pa.int64()),  # and its bytes, at the precision of this evaluation
            ("train_context", pa.int64()),
            ("train_tokens", pa.int64()),
        ]
    ),
    ("step", "data", "split", "haystack", "seed", "num_centroids", "weights", "changes", "kind", "length", "depth"),
    "needles",
)


@dataclass
class Options(RunOptions):
    kinds: list[str] = setting(list(KINDS), "kinds of needles", choices=tuple(KINDS))
    lengths: list[int] = setting([1024, 4096, 16384, 65536], "tokens of a sequence, answer included", at_least=2)
    depths: list[int] = setting(
        [0, 25, 50, 75, 100], "depths of the needle, % of the haystack", at_least=0, at_most=100
    )
    sequences: int = setting(8, "sequences per kind, length and depth", at_least=1)
    data: str = setting("builtin", "data set of the haystack, an option of configs/data; run: that of the run")
    seed: int = setting(TEST_SEED, "seed of needles and haystacks", at_least=0)
    piece: int | None = setting(None, "tokens per forward pass", at_least=1)
    split: str | None = setting(None, "held-out split of the haystack", choices=("validation", "test"))


@command(Options, overrides=True, leave=peers.leave)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    with peers.watched(Path(options.run) / "checkpoints"):
        elsewhere = [text for text in overrides if text.startswith("data.") and options.data != "run"]
        run = options.open([text for text in overrides if text not in elsewhere])
        if is_task(run.cfg):
            raise ConfigError(f"{options.run} was trained on a generated task, whose ids stand for no text")
        source = run.cfg if options.data == "run" else compose([f"data={options.data}", *elsewhere])
        rows = measure(run, options, source, changes(overrides))

        def publish() -> None:
            write_whole(run.run_dir / "needle.csv", TABLE.as_csv(run.run_dir))
            print(report(rows))
            print(run.run_dir / TABLE.file, run.run_dir / "needle.csv", sep="\n")
            with reporting("the plots of the needles"):
                print(*draw(rows, run.run_dir / "plots", changes(overrides, text=True)), sep="\n")

        processes.on_main(publish)
        processes.shutdown()
    return 0


def read_haystack(cfg: Config, tokenizer: Tokenizer, split: str) -> np.ndarray:
    """Ids of the documents of a held-out split, joined by blank lines: int64, at most `HAYSTACK_TOKENS`.

    Raises:
        ConfigError, DataError: the split cannot be read, or holds no text.
    """
    parts: list[np.ndarray] = []
    gap, held = tokenizer.encode(PARAGRAPH).astype(np.int64), 0
    for document in heldout_documents(cfg, tokenizer, split):
        parts += [document.tokens[1:-1], gap]
        held += len(parts[-2]) + len(gap)
        if held >= HAYSTACK_TOKENS:
            break
    if not parts:
        raise ConfigError(f"the {split} split of data={cfg.data.name} holds no text for a haystack; set data.{split}")
    return np.concatenate(parts)[:HAYSTACK_TOKENS]


def measure(run: Run, options: Options, source: Config, changed: str = "") -> list[Row]:
    """The rows of all kinds, lengths and depths in that order, measured or read from the table. Collective.

    Each cell is saved when it is done. Its line says how many tokens were fed.

    Args:
        source: the config whose held-out split is the haystack.
        changed: value of the table's "changes" column.

    Raises:
        ConfigError: a length has no room for its needles or exceeds the haystack, or eval.num_centroids is impossible.
    """
    cfg = run.cfg
    check_capacity(run.model, cfg)
    haystack = processes.on_main_slowly(lambda: read_haystack(source, run.tokenizer, cfg.eval.split))
    identity = hashlib.sha256(haystack.tobytes()).hexdigest()[:12]
    cells = [(k, n, d) for k in options.kinds for n in options.lengths for d in options.depths]
    for kind, length in dict.fromkeys((kind, length) for kind, length, _ in cells):
        for index in range(options.sequences):  # raises now, not after an hour's work
            NeedleTask(haystack, run.tokenizer, kind=kind, depth=0.0).make(length, options.seed, TEST, 0, index)
    done = processes.on_main(lambda: TABLE.by_key(run.run_dir))
    rows = []
    with at_capacity(run.model, cfg):
        for kind, length, depth in cells:
            row = about(run, options, identity, length) | {"changes": changed, "kind": kind, "depth": depth}
            known = done.get(TABLE.key_of(row))
            if known is None or known["sequences"] != options.sequences:
                task = NeedleTask(haystack, run.tokenizer, kind=kind, depth=depth / 100)
                row |= score(run, task, length, options)
                known = {name: row[name] for name in TABLE.schema.names}
                processes.on_main(lambda row=known: TABLE.write(run.run_dir, [row]))  # type: ignore[misc]
            rows.append(known)
            if run.world.is_main:
                print(line(known), file=sys.stderr, flush=True)
    return rows


def about(run: Run, options: Options, haystack: str, length: int) -> Row:
    """The columns of a row that describe the run and how it is tested."""
    cfg = run.cfg
    trainer = cfg.trainer
    return {
        "run": run.run_dir.resolve().name,
        "step": run.step,
        "data": cfg.data.name if options.data == "run" else options.data,
        "split": cfg.eval.split,
        "haystack": haystack,
        "seed": options.seed,
        "num_centroids": cfg.eval.num_centroids,
        "weights": cfg.eval.weights,
        "length": length,
        "sequences": options.sequences,
        "model": cfg.model.name,
        "pattern": ",".join(cfg.model.pattern),
        "window": widest_window(cfg.model),
        "parameters": count_parameters(run.model)[0],
        "state_numbers": state_size(run.model, length),
        "state_bytes": state_bytes(run.model, length, run.world.itemsize),
        "train_context": trainer.context,
        "train_tokens": run.tokens,
    }


def score(run: Run, task: NeedleTask, length: int, options: Options) -> Row:
    """The scores of one cell: exact, log_p and answer_tokens."""
    right = answers = labels = 0
    log_p = 0.0
    batch_size = max(1, TOKENS_AT_ONCE // length)
    for batch in sequences_for_test(task, length, seed=options.seed, rows=options.sequences, batch=batch_size):
        predicted, log_p_BT = predict(run.model, batch.inputs, batch.targets, run.world.device, run.cfg.eval.piece)
        got = task.score(predicted, batch.targets.numpy())
        right, answers = right + got[0], answers + got[1]
        log_p += float(log_p_BT.sum())
        labels += int((batch.targets >= 0).sum())
    assert answers == options.sequences
    return {"exact": right / answers, "log_p": log_p / answers, "answer_tokens": labels / answers}


def line(row: Row) -> str:
    return (
        f"{row['kind']:<16} {row['length']:>7} tokens fed, depth {row['depth']:>3}%: exact {row['exact']:7.1%}, "
        f"log p {row['log_p']:9.3f} nats for {row['answer_tokens']:.1f} tokens ({row['sequences']} sequences)"
    )


def report(rows: list[Row]) -> str:
    """Exact answers in per cent, means over depths: a line per kind, a column per length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    lines = [f"{'exact, % (all depths)':<22}" + "".join(f"{length:>9}" for length in lengths)]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        means = [np.mean([row["exact"] for row in rows if (row["kind"], row["length"]) == (kind, n)]) for n in lengths]
        lines.append(f"{kind:<22}" + "".join(f"{100 * mean:9.1f}" for mean in means))
    return "\n".join(lines)


SCORES = {"exact": "exact answers, %", "log_p": "log-probability of the answer, nats per token"}


def draw(rows: list[Row], folder: Path, changed: str) -> list[Path]:
    """Save a heat map of each score; returns the files, whose names have a hash of what is `changed`."""
    first = rows[0]
    variant = f"_{first['data']}_{first['split']}" + (f"_N{first['num_centroids']}" if first["num_centroids"] else "")
    seed = f"seed={first['seed']}" if first["seed"] != TEST_SEED else ""
    weights = first["weights"] if first["weights"] != "trained" else ""
    variant += mark(changed, seed, weights)
    return [style.save(heat_map(rows, name), folder / f"needle{variant}_{name}.png") for name in SCORES]


def heat_map(rows: list[Row], name: str) -> Figure:
    """Depth by length, a panel for each kind; every cell shows its number."""
    kinds, lengths, depths = ([*dict.fromkeys(row[key] for row in rows)] for key in ("kind", "length", "depth"))
    exact = name == "exact"
    at = {
        (row["kind"], row["length"], row["depth"]): 100 * row[name] if exact else row[name] / row["answer_tokens"]
        for row in rows
    }
    low, high = (0.0, 100.0) if exact else (min(at.values()), 0.0)
    fig, axes = style.figure(len(kinds), width=0.7 + 0.55 * len(lengths), height=1.2 + 0.4 * len(depths))
    image = None
    for index, (kind, ax) in enumerate(zip(kinds, axes)):
        grid = np.array([[at[kind, length, depth] for length in lengths] for depth in depths])
        image = ax.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        for y, x in np.ndindex(grid.shape):
            dark = grid[y, x] < (low + high) / 2
            ax.text(
                x,
                y,
                f"{grid[y, x]:.{0 if exact else 1}f}",
                ha="center",
                va="center",
                fontsize=7,
                color="w" if dark else "k",
            )
        ax.set_title(kind, fontsize=9)
        ax.set_xticks(range(len(lengths)), [style.short(length) for length in lengths], fontsize=8)
        ax.set_yticks(range(len(depths)), [str(depth) for depth in depths] if index == 0 else [""] * len(depths))
        ax.grid(False)
    axes[0].set_ylabel("depth of the needle, %")
    fig.supxlabel("tokens in the sequence", fontsize=10)
    of = f"{rows[0]['model']}, step {rows[0]['step']:,}, trained at {style.short(rows[0]['train_context'])}"
    fig.suptitle(f"{of}: {SCORES[name]}")
    assert image is not None
    fig.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    return fig


if __name__ == "__main__":
    sys.exit(main())
