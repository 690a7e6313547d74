"""Pretrain a language model at long context: the whole run, top to bottom.

    python train.py experiment=cpu_demo                          one process, GPU or CPU
    torchrun --nproc_per_node 8 train.py experiment=pg19_150m    one process per GPU, sharded with FSDP
    python train.py --help                                       every setting

Exit status: 0 finished, or stopped by a signal after saving; 1 training or data failed; 2 a setting is wrong;
130 interrupted before training began.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported inside functions: Ctrl-C during an import prints one line, a typo needs no torch
    from ovq.config import Config
    from ovq.model import Transformer


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status. An error that the user can act on is printed as one line."""
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
    """Print, on rank 0 only, what the run would be and cost, and what starting it would refuse or report."""
    from data.build import build_tokenizer
    from data.describe import describe
    from eval.preflight import look_ahead
    from ovq.plan import report

    if os.environ.get("RANK", "0") != "0":
        return
    check_classes(cfg)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    vocab_size = cfg.tokenizer.vocab_size or build_tokenizer(cfg).vocab_size
    found = describe(cfg)
    broken = [split.partition(" ")[0] for split in found if "error" in found[split]]  # a mixture has "train NAME"
    epochs, lines = look_ahead(cfg, run_dir, vocab_size, broken)
    print("\n".join([report(cfg, vocab_size, found, world_size, run_dir, epochs), *lines]))


def train(cfg: Config, run_dir: Path) -> None:
    """Train until the last step or a signal, from the newest good checkpoint of the run folder if there is one."""
    from data.build import build_loader, build_tokenizer, is_task
    from data.loader import merge_states
    from eval.per_position import evaluate
    from eval.preflight import check_held_out, check_room, check_training_data
    from ovq import processes, stacks
    from ovq.inference.run import check_capacity
    from ovq.model import build_model, flops_per_token
    from ovq.optim_config import last_before_decay
    from ovq.train import checkpoint, loop
    from ovq.train.backends import choose_backends
    from ovq.train.claim import check_continues, check_same_run, claim, elsewhere, other_precision
    from ovq.train.ema import WeightAverage
    from ovq.train.metrics import Metrics
    from ovq.train.optim import build_optimizer
    from ovq.train.parallelize import parallelize
    from ovq.train.rehearse import naming_what_saves_memory, rehearse
    from ovq.train.schedule import check_extension
    from ovq.train.summary import finish
    from ovq.train.warm_start import start_from

    check_classes(cfg)
    choose_threads(cfg, run_dir)
    world = processes.init(cfg.trainer)
    processes.seed_everything(cfg.seed, cfg.trainer.deterministic)
    begun = check_same_run(run_dir, cfg)
    tokenizer = build_tokenizer(cfg, run_dir if begun else None)
    stacks.register(run_dir)
    hints = processes.on_main_slowly(lambda: check_held_out(cfg, tokenizer))

    model = build_model(cfg.model, tokenizer.vocab_size)
    processes.on_main(lambda: check_room(cfg, model, run_dir))
    model.init_weights(cfg.seed)
    model = parallelize(model, cfg.trainer, world, cfg.data.isolate_documents)
    choose_backends(model, cfg, world)
    optimizer = build_optimizer(model, cfg)
    ema = WeightAverage(model, cfg.optim.ema) if cfg.optim.ema else None
    check_capacity(model, cfg)
    rehearse(model, optimizer, cfg, tokenizer.vocab_size, world)

    start = checkpoint.choose(run_dir, cfg.resume)
    if start.path:
        check_continues(checkpoint.read_extra(start.path)["config"], cfg)
    extra = checkpoint.load(start.path, model, optimizer, ema) if start.path else None
    if extra:
        check_extension(cfg, extra["config"], extra["step"])
    began = start_from(cfg, model, tokenizer.fingerprint) if cfg.init_from.path and not extra else ""
    if ema is not None and began:
        ema.restart(model)
    loader = build_loader(cfg, tokenizer, world, extra["data"] if extra else None)
    hints += processes.on_main_slowly(lambda: check_training_data(cfg, loader.tokens, tokenizer))
    hints += [elsewhere(run_dir, cfg), other_precision(extra, cfg, world)]
    keep_last, keep_at = cfg.trainer.keep_last, last_before_decay(cfg.optim, cfg.trainer.steps)
    checkpoint.settle(run_dir, start, keep_last, keep_at)
    claim(run_dir, cfg, tokenizer)

    def loss_by_position(model: Transformer, step: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        return evaluate(model, cfg, tokenizer, world, run_dir, step, should_stop)

    metrics = Metrics(run_dir, cfg, main=world.is_main, start_step=extra["step"] if extra else 0)
    trainer = loop.Trainer(
        cfg,
        model,
        optimizer,
        loader,
        checkpoint.Checkpointer(
            run_dir, keep_last=keep_last, keep_at=keep_at, asynchronous=cfg.trainer.async_checkpoint
        ),
        metrics,
        world,
        run_dir=run_dir,
        merge_states=merge_states,
        evaluate=None if is_task(cfg) else loss_by_position,
        flops_per_token=functools.cache(functools.partial(flops_per_token, model)),
        ema=ema,
    )
    if extra:
        trainer.resume(extra)
        began = f"resumed from {start.path} at step {trainer.step}"
    for line in filter(None, [began, *hints]):
        trainer.say(line)
    with trainer.signal:  # until the end: a launcher may pass the signal on after the last step
        with metrics, naming_what_saves_memory(cfg.trainer):
            summary = trainer.fit()
            if world.is_main:
                finish(summary, cfg, run_dir)
        processes.shutdown()


def check_classes(cfg: Config) -> None:
    """Refuse settings that the mixers or the task do not accept, before the run folder is created."""
    from data.build import build_task, is_task
    from ovq.model import check_mixers

    check_mixers(cfg.model)
    if is_task(cfg):
        build_task(cfg).check_context(cfg.trainer.context)


def choose_threads(cfg: Config, run_dir: Path) -> None:
    """Fix the number of CPU threads when a run first starts: a different number would round sums differently."""
    from ovq import config, cpu
    from ovq.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return  # the launcher chooses
    if cfg.trainer.threads is None and (run_dir / "config.yaml").is_file():
        with contextlib.suppress(ConfigError):  # reported where the folder is claimed
            cfg.trainer.threads = config.load(run_dir).trainer.threads
    cfg.trainer.threads = cpu.choose_threads(cfg.trainer.threads)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the command line itself was being imported
        print("interrupted", file=sys.stderr)
        sys.exit(130)
