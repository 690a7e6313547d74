"""How few bytes OVQ's dictionary needs: recall with its sums stored in other formats between chunks.

    python -m eval.stored_state run=RUN lengths=[128,2048] num_centroids=4096 answers=8192
    python -m eval.stored_state run=RUN formats=[sums_float32,means_bf16] out=docs/results/stored_state

After every chunk the dictionary is stored and read back, as a smaller state would be; the computation within a chunk is
unchanged. Formats: key and value sums in float32 (what the operator keeps); sums, or means, in bf16, rounded to nearest
or stochastically (so that small additions are kept on average instead of always being lost); means as 8-bit integers
with a scale for each centroid. Counts are float32. Prints a table and adds its rows to stored_state.csv in `out`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.build import build_task, is_task
from eval.answers import test
from eval.run_table import Row, changes
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.files import locked, write_whole
from ovq.inference.run import RunOptions, at_capacity
from ovq.mixers.ovq import OVQ
from ovq.ops.ovq_attention import OVQState
from ovq.schema import setting

KEY = ("run", "step", "changes", "format", "num_centroids", "length")  # what identifies a row
COLUMNS = [*KEY, "accuracy", "answers", "bytes_of_a_centroid", "dictionary_bytes"]
Stored = Callable[[Tensor, Tensor], Tensor]  # sums [B, G, N, D] and counts [B, G, N] -> the sums as read back


@dataclass(frozen=True)
class Format:
    """How sums are stored: `bytes_of` gives the bytes of a centroid's D numbers, and what `stored` returns, anew for
    each test, gives the sums as read back."""

    bytes_of: Callable[[int], int]
    stored: Callable[[], Stored]


def nearest(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


class Stochastic:
    """Rounds x to one of its two neighbours in bf16, up with the probability that keeps the mean; float32."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.randint(0, 1 << 16, x.shape, generator=self.generator, dtype=torch.int32).to(x.device)
        return ((x.float().view(torch.int32) + noise) & ~0xFFFF).view(torch.float32).to(x.dtype)


def integers(x: Tensor) -> Tensor:
    """8-bit integers with a scale for each row, rounded to nearest."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round() * scale


def of_sums(rounded: Callable[[Tensor], Tensor]) -> Stored:
    return lambda sums, count: rounded(sums)


def of_means(rounded: Callable[[Tensor], Tensor]) -> Stored:
    def stored(sums: Tensor, count: Tensor) -> Tensor:
        weight = count.clamp(min=1)[..., None]
        return rounded(sums / weight) * weight

    return stored


FORMATS = {
    "sums_float32": Format(lambda D: 4 * D, lambda: of_sums(lambda x: x)),
    "sums_bf16": Format(lambda D: 2 * D, lambda: of_sums(nearest)),
    "sums_bf16_stochastic": Format(lambda D: 2 * D, lambda: of_sums(Stochastic())),
    "means_bf16": Format(lambda D: 2 * D, lambda: of_means(nearest)),
    "means_bf16_stochastic": Format(lambda D: 2 * D, lambda: of_means(Stochastic())),
    "means_int8": Format(lambda D: D + 4, lambda: of_means(integers)),
}


def in_format(name: str) -> Callable[[list[Any]], list[Any]]:
    """A function from a model's state to the same state with its dictionaries stored and read back."""
    stored = FORMATS[name].stored()

    def change(state: Any) -> Any:
        if not isinstance(state, OVQState):
            return state
        key_sum, value_sum = stored(state.key_sum, state.count), stored(state.value_sum, state.count)
        return replace(state, key_sum=key_sum, value_sum=value_sum)

    return lambda states: [change(state) for state in states]


@dataclass
class Options(RunOptions):
    lengths: list[int] | None = setting(
        None, "tokens of sequences; null: 1, 4 and 16 times those of training", at_least=1
    )
    formats: list[str] = setting([*FORMATS], "formats of the sums", choices=tuple(FORMATS))
    answers: int = setting(8192, "minimum answers per test", at_least=1)
    out: str | None = setting(None, "folder of stored_state.csv; null: the run folder", writes="folder")


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    path = Path(options.out or options.run) / "stored_state.csv"
    run = options.open(["trainer.precision=fp32", *overrides], out=options.out)
    read(path)  # raises, before the work, if it is something else
    layers = [mixer for mixer in run.model.mixers() if isinstance(mixer, OVQ)]
    if not is_task(run.cfg) or not layers:
        raise ConfigError(f"{options.run} must be a run with OVQ layers that was trained on a generated task")
    chunk = layers[0].spec.chunk_size
    if any(layer.spec.chunk_size != chunk for layer in layers):
        raise ConfigError(f"{options.run} has layers with different chunk_size, which are not stored at the same time")
    task, rows = build_task(run.cfg), []
    with at_capacity(run.model, run.cfg):
        for length in options.lengths or [factor * run.cfg.trainer.context for factor in (1, 4, 16)]:
            for name in options.formats:
                tally = test(
                    *(run.model, run.world.device, task, length, options.answers), piece=chunk, between=in_format(name)
                )
                right, answers = tally.total
                shape = layers[0].shape
                held = 2 * FORMATS[name].bytes_of(shape.head_dim) + 4
                row = {"run": run.run_dir.resolve().name, "step": run.step, "format": name}
                row["changes"] = changes(overrides, text=True)
                row |= {"num_centroids": layers[0].spec.num_centroids, "length": length}
                row |= {"accuracy": round(right / answers, 6), "answers": answers}
                row |= {"bytes_of_a_centroid": held}
                row["dictionary_bytes"] = held * layers[0].spec.num_centroids * shape.num_kv_heads * len(layers)
                rows.append(row)
                print(
                    f"{length:>7} tokens  {name:<22} {held:>4} bytes per centroid  {right / answers:7.2%}", flush=True
                )
    save(path, rows)
    print(path)
    return 0


def save(path: Path, rows: list[Row]) -> None:
    """Add rows to the file, in place of those of the same tests; whole or not at all."""
    fresh = {key_of(row) for row in rows}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    with locked(path.parent, wait=True):
        writer.writerows([*(row for row in read(path) if key_of(row) not in fresh), *rows])
        write_whole(path, text.getvalue())


def key_of(row: Row) -> tuple[str, ...]:
    """What identifies a row: a test that is repeated replaces its own."""
    return tuple(str(row[name]) for name in KEY)


def read(path: Path) -> list[Row]:
    """The rows in a file; none if there is no file.

    Raises:
        ConfigError: the file contains something else.
    """
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ConfigError(f"{path} is not a table of this command; move it away, or name another folder: out=DIR")
        return list(reader)


if __name__ == "__main__":
    sys.exit(main())
