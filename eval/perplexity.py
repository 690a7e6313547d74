"""Perplexity over whole documents, as published for PG19: exp(nats of the split / words of the split).

    python -m eval.perplexity run=runs/pg19_150m split=test
    torchrun --nproc_per_node 8 -m eval.perplexity run=runs/pg19_480m split=test batch=4

Every document is processed from its first token to its last with the state carried along, so a model with a
constant-size state needs no more memory for a book than for a page. The word count is the one published for the data
set (data.words) when the whole split is measured and it is within 2% of the count of words at whitespace, which is used
otherwise. Adds the result to perplexity_<split>.json in the run folder, a list; it replaces only one of the same
checkpoint, weights, capacity, changed settings and number of documents.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from eval import result_list
from eval.heldout import HeldOut
from eval.run_table import changes
from ovq import peers, processes
from ovq.cli import command
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.files import locked, write_whole
from ovq.inference.losses import exp, losses_by_position
from ovq.inference.run import RunOptions, at_capacity
from ovq.model import Transformer
from ovq.processes import World
from ovq.report import readable
from ovq.schema import setting

KEY = ("step", "weights", "num_centroids", "changes", "asked")  # what identifies a result in a file
TOLERANCE = 0.02  # relative difference of a published word count from the count here that other rules may explain


@dataclass
class Options(RunOptions):
    split: str | None = setting(None, "held-out split", choices=("validation", "test"))
    documents: int | None = setting(None, "measure only this many documents; null: the whole split", at_least=1)
    piece: int | None = setting(None, "tokens per forward pass", at_least=1)
    batch: int | None = setting(None, "documents per batch on each rank", at_least=1)


def measure(
    model: Transformer,
    cfg: Config,
    tokenizer: Tokenizer,
    world: World,
    should_stop: Callable[[], bool],
    *,
    documents: int | None = None,
) -> dict[str, Any] | None:
    """Loss, bits per byte and perplexities over the first `documents` of the split, or all. Collective.

    Returns None if should_stop() returned True; it is called before every piece, equally often on every rank.

    Raises:
        ConfigError: the split holds no text, or no layer has a dictionary for eval.num_centroids.
        DataError: the documents cannot be read.
    """
    heldout = HeldOut(cfg, tokenizer, None, documents)
    nats, tokens = 0.0, 0
    with at_capacity(model, cfg):
        while excerpts := heldout.round(cfg.eval.batch * world.data.size):
            own = excerpts[world.data.rank :: world.data.size]
            losses_DT = losses_by_position(
                model,
                [excerpt.tokens for excerpt in own or excerpts[:1]],
                positions=max(len(excerpt.tokens) for excerpt in excerpts) - 1,
                piece=cfg.eval.piece,
                device=world.device,
                should_stop=should_stop,
                context=world.context,
            )
            if losses_DT is None:
                return None
            counts = own and world.context.rank == 0
            nats += sum(processes.gather_objects(float(losses_DT.sum()) if counts else 0.0))
            tokens += sum(len(excerpt.tokens) - 1 for excerpt in excerpts)
    if not tokens:
        raise ConfigError(f"the {cfg.eval.split} split holds no text; set data.{cfg.eval.split}")
    published = cfg.data.words.get(cfg.eval.split) if documents is None else None
    if published and abs(heldout.num_words / published - 1) > TOLERANCE:
        if world.is_main:
            print(
                f"data.words.{cfg.eval.split}={published} is not the number of words of this text, {heldout.num_words},"
                " which word_perplexity is over",
                file=sys.stderr,
            )
        published = None
    words = published or heldout.num_words
    return {
        "split": cfg.eval.split,
        "documents": heldout.given,
        "tokens": tokens,
        "bytes": heldout.num_bytes,
        "words": words,
        "words_are": "published" if published else "counted",
        "words_counted": heldout.num_words,
        "num_centroids": cfg.eval.num_centroids,
        "loss": nats / tokens,
        "perplexity": exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / heldout.num_bytes if heldout.num_bytes else None,
        "word_perplexity": exp(nats / words) if words else None,
    }


@command(Options, overrides=True, leave=peers.leave)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    with peers.watched(Path(options.run) / "checkpoints"):
        run = options.open(overrides, shares=True, own=["documents"])
        processes.on_main(lambda: read(path_of(run.run_dir, run.cfg.eval.split)))  # raises now, not after the work
        results = measure(run.model, run.cfg, run.tokenizer, run.world, lambda: False, documents=options.documents)
        assert results is not None  # nothing could stop it
        if run.world.is_main:
            model = {"step": run.step, "weights": run.cfg.eval.weights, "changes": changes(overrides, text=True)}
            results = {**model, "asked": options.documents, **results}
            show(results, save(run.run_dir, results))
        processes.shutdown()
    return 0


def show(results: dict[str, Any], path: Path) -> None:
    """Print the results, and the path of the file that has all their digits."""
    for name, value in results.items():
        print(f"{name:<16} {readable(value)}")
    print(path)


def path_of(run_dir: Path, split: str) -> Path:
    return run_dir / f"perplexity_{split}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file: see `result_list.read`."""
    return result_list.read(path, "perplexity", float, mend="move it away")


def save(run_dir: Path, results: dict[str, Any]) -> Path:
    """Add a result to perplexity_<split>.json, in place of one with the same `KEY`, atomically; returns the path."""
    path = path_of(run_dir, results["split"])
    with locked(run_dir, wait=True):
        kept = [each for each in read(path) if any(each.get(name) != results[name] for name in KEY)]
        write_whole(path, json.dumps([*kept, results], indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
