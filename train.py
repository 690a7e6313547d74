"""Pretrain a language model at long context: the whole of a run, top to bottom.

    python train.py experiment=cpu_demo                          one process, GPU or CPU
    torchrun --nproc_per_node 8 train.py experiment=pg19_150m    one process per GPU, sharded with FSDP
    python train.py --help                                       every setting

Exit status: 0 finished, or stopped by a signal after saving; 1 training or data failed; 2 a setting is wrong;
130 interrupted before training began.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported within functions: a Ctrl-C during imports is one line, and a typo needs no torch
    from data.tokenizer import Tokenizer
    from ovq.config import Config
    from ovq.model import Transformer


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors that a user can act on are one line."""
    from ovq import peers
    from ovq.cli import guarded

    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: run(argv), peers.leave)


def run(argv: list[str]) -> None:
    from ovq import compose, peers
    from ovq.cli import HELP
    from ovq.overrides import directories

    if any(word in argv for word in HELP):
        print(compose.help_text(directories(argv)[0]))
        return
    cfg = compose.compose(argv)  # before torch is imported: a typo is refused at once
    run_dir = compose.run_dir_of(cfg, argv)
    with peers.watched(run_dir / "checkpoints"):
        (dry_run if cfg.dry_run else train)(cfg, run_dir)


def dry_run(cfg: Config, run_dir: Path) -> None:
    """Print what the run would be and cost."""
    from data.build import build_tokenizer, describe
    from ovq.plan import report

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    vocab_size = cfg.tokenizer.vocab_size or build_tokenizer(cfg).vocab_size
    print(report(cfg, vocab_size, describe(cfg), world_size, run_dir))


def train(cfg: Config, run_dir: Path) -> None:
    """Train to the last step or until a signal, from the newest good checkpoint of the run folder if there is one."""
    from data.build import build_loader, build_tokenizer, is_task
    from data.loader import merge_states
    from eval.per_position import check_capacity, evaluate
    from ovq import processes, stacks
    from ovq.model import build_model, flops_per_token
    from ovq.train import checkpoint, loop
    from ovq.train.metrics import Metrics
    from ovq.train.optim import build_optimizer, check_extension
    from ovq.train.parallelize import parallelize
    from ovq.train.rehearse import rehearse
    from ovq.train.selftest import choose_backends
    from ovq.train.summary import finish
    from ovq.train.warm_start import start_from

    check_held_out(cfg)
    check_classes(cfg)
    choose_threads(cfg, run_dir)
    world = processes.init(cfg.trainer)
    processes.seed_everything(cfg.seed, cfg.trainer.deterministic)
    tokenizer = build_tokenizer(cfg, run_dir)
    check_vocabulary(cfg, tokenizer)
    claim(run_dir, cfg, tokenizer)
    stacks.register(run_dir)

    model = build_model(cfg.model, tokenizer.vocab_size)
    model.init_weights(cfg.seed)
    flops = flops_per_token(model, cfg.trainer.context)
    choose_backends(model, cfg, world)
    model = parallelize(model, cfg.trainer, world)
    optimizer = build_optimizer(model, cfg.optim)
    check_capacity(model, cfg)
    rehearse(model, cfg, tokenizer.vocab_size, world)

    start = checkpoint.choose(run_dir, cfg.resume, cfg.trainer.keep_last)
    extra = checkpoint.load(start, model, optimizer) if start else None
    if extra:
        check_extension(cfg, extra["config"]["trainer"]["steps"], extra["step"])
    began = start_from(cfg.init_from, model, tokenizer.fingerprint) if cfg.init_from.path and not extra else ""
    loader = build_loader(cfg, tokenizer, world, extra["data"] if extra else None)

    def loss_by_position(model: Transformer, step: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
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
        evaluate=None if is_task(cfg) else loss_by_position,
        flops_per_token=flops,
    )
    if extra:
        trainer.resume(extra)
        began = f"resumed from {start} at step {trainer.step}"
    if began:
        trainer.say(began)
    with trainer.signal:  # until the end: a launcher may pass the signal on after the last step
        try:
            summary = trainer.fit()
        finally:
            metrics.close()
        if world.is_main:
            finish(summary, cfg, run_dir)
        processes.shutdown()


def check_held_out(cfg: Config) -> None:
    """Refuse a run that would have nothing to evaluate on after days of training."""
    from data.build import FROM_FILES
    from ovq.errors import ConfigError

    wanted = cfg.eval.at_end or cfg.trainer.eval_every
    if wanted and cfg.data.kind in FROM_FILES and not getattr(cfg.data, cfg.eval.split):
        raise ConfigError(
            f"data.{cfg.eval.split} is empty, so loss by position cannot be evaluated; give it files, "
            "or set eval.at_end=false trainer.eval_every=0"
        )


def check_classes(cfg: Config) -> None:
    """Refuse settings that the mixers or the task do not take, before the run folder is made."""
    from data.build import build_task, is_task
    from ovq.model import check_mixers

    check_mixers(cfg.model)
    if is_task(cfg):
        build_task(cfg).check_context(cfg.trainer.context)


def choose_threads(cfg: Config, run_dir: Path) -> None:
    """Settle the number of CPU threads at a run's first start: another number would round sums differently."""
    from ovq import config, cpu
    from ovq.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return  # the launcher chooses
    if cfg.trainer.threads is None and (run_dir / "config.yaml").is_file():
        with contextlib.suppress(ConfigError):  # reported where the folder is claimed
            cfg.trainer.threads = config.load(run_dir).trainer.threads
    cfg.trainer.threads = cpu.choose_threads(cfg.trainer.threads)


def check_vocabulary(cfg: Config, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose size differs from the config's."""
    from ovq.errors import ConfigError

    if cfg.tokenizer.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}, but {cfg.tokenizer.model_path} has "
            f"{tokenizer.vocab_size} pieces; set it to that, or to null"
        )


def check_same_run(run_dir: Path, cfg: Config) -> None:
    """Refuse a run folder that was made with other settings, or, with resume=never, one that has checkpoints."""
    from ovq import config
    from ovq.errors import ConfigError
    from ovq.train.metrics import read_rows

    saved = [*(run_dir / "checkpoints").glob("step_*"), *(run_dir / "checkpoints").glob("aside_step_*")]
    if cfg.resume == "never" and saved:
        raise ConfigError(f"resume=never, but {run_dir} holds checkpoints; use another run_dir or remove them")
    # A start that failed before the first step claims nothing.
    stepped = saved or read_rows(run_dir / "metrics.jsonl")
    if stepped and (run_dir / "config.yaml").exists() and cfg.resume != "never":
        changed = config.changed_identity(config.load(run_dir), cfg)
        if changed:
            raise ConfigError(f"{run_dir} was made with other settings ({'; '.join(changed)}); use another run_dir")


def claim(run_dir: Path, cfg: Config, tokenizer: Tokenizer) -> None:
    """Claim the run folder: refuse one made with other settings, then store config and tokenizer in it."""
    from ovq import config
    from ovq.processes import on_main
    from ovq.train.checkpoint import hold
    from ovq.train.summary import FILE

    def store() -> None:
        hold(run_dir / "checkpoints")  # before any file of a run in progress is touched
        check_same_run(run_dir, cfg)
        (run_dir / FILE).unlink(missing_ok=True)  # or a process waiting for it would take that of an earlier run
        tokenizer.save(run_dir / "tokenizer")
        config.save(cfg, run_dir)

    on_main(store)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the command line itself was being imported
        print("interrupted", file=sys.stderr)
        sys.exit(130)
