"""Pretrain a language model at long context: the whole of a run, top to bottom.

    python train.py experiment=cpu_demo                          one process, GPU or CPU
    torchrun --nproc_per_node 8 train.py experiment=pg19_150m    one process a GPU, sharded with FSDP
    python train.py --help                                       every setting

Exit status: 0 finished, or stopped by a signal after saving; 1 training or data failed; 2 a setting is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ovq import config
from ovq.config import ConfigError
from ovq.files import write_whole


def main(argv: list[str]) -> int:
    """Run the command line; errors that a user can mend are one line."""
    if {"-h", "--help"} & set(argv):
        print(config.help_text())
        return 0
    try:
        cfg = config.compose(argv)  # before torch is imported: a typo is refused at once
        run_dir = config.run_dir_of(cfg, argv)
        if cfg.dry_run:
            return dry_run(cfg, run_dir)
        return train(cfg, run_dir)
    except ConfigError as error:
        return fail(error, 2)
    except Exception as error:
        from data.sources import DataError
        from ovq.ops.fla import BackendError
        from ovq.train.checkpoint import CheckpointError
        from ovq.train.loop import TrainingError

        if isinstance(error, BackendError):
            return fail(error, 2)
        if isinstance(error, DataError | CheckpointError | TrainingError | OSError):
            return fail(error, 1)
        raise


def fail(error: Exception, status: int) -> int:
    """Print the error as one line, from the main process where all of them have it."""
    if status == 1 or os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


def dry_run(cfg: Any, run_dir: Path) -> int:
    """Print what the run would be and cost."""
    from data import build_tokenizer, describe
    from ovq.plan import report

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    vocab_size = cfg.tokenizer.vocab_size or build_tokenizer(cfg).vocab_size
    print(report(cfg, vocab_size, describe(cfg), world_size, run_dir))
    return 0


def train(cfg: Any, run_dir: Path) -> int:
    """Train to the last step or until a signal, from the newest good checkpoint of the run folder if there is one."""
    from data import build_loader, build_tokenizer, merge_states
    from eval.per_position import check, evaluate
    from ovq.model import build_model, flops_per_token
    from ovq.train import checkpoint, distributed, loop
    from ovq.train.metrics import Metrics
    from ovq.train.optim import build_optimizer

    check_held_out(cfg)
    world = distributed.init(cfg.trainer)
    distributed.seed_everything(cfg.seed, cfg.trainer.deterministic)
    tokenizer = build_tokenizer(cfg, run_dir)
    if cfg.tokenizer.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but {cfg.tokenizer.model_path} has "
            f"{tokenizer.vocab_size} pieces; set it to that, or to null"
        )
    claim(run_dir, cfg, tokenizer)

    model = build_model(cfg.model, tokenizer.vocab_size)
    model.init_weights(cfg.seed)
    flops = flops_per_token(model, cfg.trainer.context)
    model = distributed.parallelize(model, cfg.trainer, world)
    optimizer = build_optimizer(model, cfg.optim)
    check(model, cfg)
    loop.rehearse(model, cfg, tokenizer.vocab_size, world)

    start = checkpoint.choose(run_dir, cfg.resume)
    extra = checkpoint.load(start, model, optimizer) if start else None
    loader = build_loader(
        cfg, tokenizer, rank=world.rank, world_size=world.size, state=extra["data"] if extra else None
    )

    def loss_by_position(model: Any, step: int, should_stop: Any) -> dict[str, float] | None:
        return evaluate(model, cfg, tokenizer, world, run_dir, step, should_stop)

    metrics = Metrics(run_dir, cfg, main=world.is_main, start_step=extra["step"] if extra else 0)
    trainer = loop.Trainer(
        cfg,
        model,
        optimizer,
        loader,
        checkpoint.Checkpointer(run_dir, keep_last=cfg.trainer.keep_last, asynchronous=cfg.trainer.async_checkpoint),
        metrics,
        world,
        run_dir=run_dir,
        merge_states=merge_states,
        evaluate=None if cfg.data.kind == "recall" else loss_by_position,
        flops_per_token=flops,
    )
    if extra:
        trainer.resume(extra)
        trainer.say(f"resumed from {start} at step {trainer.step}")
    try:
        summary = trainer.fit()
    finally:
        metrics.close()
    if world.is_main:
        finish(summary, cfg, run_dir)
    distributed.shutdown()
    return 0


def check_held_out(cfg: Any) -> None:
    """Refuse a run that would train for days and then have nothing to evaluate on."""
    wanted = cfg.eval.at_end or cfg.trainer.eval_every
    if wanted and cfg.data.kind in ("parquet", "jsonl", "text") and not cfg.data[cfg.eval.split]:
        raise ConfigError(
            f"data.{cfg.eval.split} is empty, so loss by position cannot be evaluated; give it files, "
            "or set eval.at_end=false trainer.eval_every=0"
        )


def claim(run_dir: Path, cfg: Any, tokenizer: Any) -> None:
    """Make the run folder this run's: refuse one made with other settings, then store config and tokenizer in it."""
    from ovq.train.checkpoint import hold
    from ovq.train.distributed import on_main

    def store() -> None:
        hold(run_dir / "checkpoints")  # before a byte of a run that is under way is touched
        if cfg.resume == "never" and any((run_dir / "checkpoints").glob("step_*")):
            raise ConfigError(f"resume=never, but {run_dir} holds checkpoints; use another run_dir or remove them")
        if (run_dir / "config.yaml").exists() and cfg.resume != "never":
            changed = config.changed_identity(config.load(run_dir), cfg)
            if changed:
                raise ConfigError(f"{run_dir} was made with other settings ({'; '.join(changed)}); use another run_dir")
        (run_dir / "summary.json").unlink(missing_ok=True)  # whoever waits for it must not take an older run's
        tokenizer.save(run_dir / "tokenizer")
        config.save(cfg, run_dir)

    on_main(store)


def finish(summary: dict[str, Any], cfg: Any, run_dir: Path) -> None:
    """Print the summary; a finished run also leaves it as summary.json, the last file it writes."""
    from ovq.train.loop import summary_text

    print(summary_text(summary, cfg, run_dir))
    if summary["stopped_by"] is None:
        write_whole(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
