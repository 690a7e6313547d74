"""Perplexity over whole documents, as PG19's is published: exp(nats of the split / words of the split).

    python -m eval.perplexity run=runs/pg19_150m split=test
    torchrun --nproc_per_node 8 -m eval.perplexity run=runs/pg19_480m split=test batch=4
    options: run checkpoint split documents piece batch num_centroids, and settings by their full names

Every document is read from its first token to its last with the state carried, so a model whose state is constant needs
no more memory for a book than for a page. Words are those published for the data set (data.words) when the whole split
is measured, else counted at whitespace. The run folder gets perplexity_<split>.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from data import DataError
from eval.heldout import HeldOut, losses_by_position
from eval.per_position import check, exp
from ovq.config import ConfigError
from ovq.files import write_whole
from ovq.mixers.base import other_capacity
from ovq.train import distributed as parallel

OPTIONS = ("split", "documents", "piece", "batch", "num_centroids")


def measure(
    model: nn.Module,
    cfg: Any,
    tokenizer: Any,
    world: parallel.World,
    should_stop: Callable[[], bool],
    *,
    documents: int | None = None,
) -> dict[str, Any] | None:
    """Loss, bits per byte and perplexities over the first `documents` of the split, or all. Collective.

    None if should_stop() said so; it is asked before every piece, equally often on every rank.

    Raises:
        ConfigError: the split holds no text, or no layer has a dictionary for eval.num_centroids.
        DataError: the documents cannot be read.
    """
    check(model, cfg)
    heldout = HeldOut(cfg, tokenizer, None, documents)
    nats, tokens = 0.0, 0
    with other_capacity(model.mixers(), cfg.eval.num_centroids):  # type: ignore[operator]
        while excerpts := heldout.round(cfg.eval.batch * world.size):
            own = excerpts[world.rank :: world.size]
            losses_DT = losses_by_position(
                model,
                [excerpt.tokens for excerpt in own or excerpts[:1]],
                positions=max(len(excerpt.tokens) for excerpt in excerpts) - 1,
                piece=cfg.eval.piece,
                loss_chunk_tokens=cfg.trainer.loss_chunk_tokens,
                device=world.device,
                should_stop=should_stop,
            )
            if losses_DT is None:
                return None
            nats += sum(parallel.gather_objects(float(losses_DT.sum()) if own else 0.0))
            tokens += sum(len(excerpt.tokens) - 1 for excerpt in excerpts)
    if not tokens:
        raise ConfigError(f"the {cfg.eval.split} split holds no text; set data.{cfg.eval.split}")
    published = cfg.data.words.get(cfg.eval.split) if documents is None else None
    words = published or heldout.num_words
    return {
        "split": cfg.eval.split,
        "documents": heldout.given,
        "tokens": tokens,
        "bytes": heldout.num_bytes,
        "words": words,
        "words_are": "published" if published else "counted",
        "num_centroids": cfg.eval.num_centroids,
        "loss": nats / tokens,
        "perplexity": exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / heldout.num_bytes if heldout.num_bytes else None,
        "word_perplexity": exp(nats / words) if words else None,
    }


def main(argv: list[str]) -> int:
    """The command line in the module's docstring. Returns the exit status."""
    from eval.run import fail, load_run, tool_arguments
    from ovq.train.checkpoint import CheckpointError

    try:
        run_dir, at, overrides = tool_arguments(argv, OPTIONS)
        run = load_run(run_dir, overrides, checkpoint_at=at)
        limited = any(text.startswith("eval.documents=") for text in overrides)
        results = measure(
            run.model,
            run.cfg,
            run.tokenizer,
            run.world,
            lambda: False,
            documents=run.cfg.eval.documents if limited else None,
        )
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        return fail(error)
    assert results is not None  # nothing told it to stop
    if run.world.is_main:
        path = save(run_dir, {"step": run.step, **results})
        for name, value in results.items():
            print(f"{name:<16} {value:,}" if isinstance(value, int) else f"{name:<16} {value}")
        print(path)
    parallel.shutdown()
    return 0


def save(run_dir: Path, results: dict[str, Any]) -> Path:
    """Write perplexity_<split>.json, whole or not at all."""
    path = run_dir / f"perplexity_{results['split']}.json"
    write_whole(path, json.dumps(results, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
