"""Speed and memory of training for each model and context: tokens/s, MFU and peak memory.

    python -m eval.bench.models models=[sw,sw_ovq] size=tiny contexts=[2048,4096] steps=3
    python -m eval.bench.models size=150m contexts=[4096,16384,65536] trainer.activation_checkpointing=full

The steps timed are those of `ovq.train.loop.Trainer`, on random tokens. Every model and context runs in a process of
its own, so that peak memory is its own and running out of it ends only that measurement. The first step compiles and is
timed separately; tokens/s is computed from the median of `steps` later ones. Memory is the peak allocated on a GPU; on
a CPU, the growth of the process's resident set after its imports. bench_models.json (rewritten after every measurement)
and bench_models.png are written to `out`. A key with a dot is a setting of the run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.lanes import first_state
from data.loader import Batch, merge_states
from eval import style
from eval.bench.compare import named_models
from ovq import machine, processes
from ovq.cli import command
from ovq.compose import CONFIG_DIR, compose, options
from ovq.config import Config
from ovq.errors import one_line
from ovq.files import write_whole
from ovq.model import build_model, flops_per_token
from ovq.processes import World
from ovq.report import reporting
from ovq.schema import setting
from ovq.train.checkpoint import Checkpointer
from ovq.train.loop import Trainer
from ovq.train.metrics import Metrics
from ovq.train.optim import build_optimizer
from ovq.train.parallelize import parallelize

Measured = dict[str, Any]
OUT_OF_MEMORY = "out of memory"
SIGKILL = -9  # the return code of a process that Linux killed for lack of memory


def config_of(settings: dict[str, Any]) -> Config:
    """The config of one measurement.

    Raises:
        ConfigError: an override is wrong.
    """
    return compose(
        [
            f"model={settings['model']}",
            f"model/size={settings['size']}",
            f"trainer.context={settings['context']}",
            f"trainer.micro_batch={settings['batch']}",
            f"trainer.global_batch={settings['batch']}",
            *settings["overrides"],
        ]
    )


# --- in the child ----------------------------------------------------------------------------------------------------


class RandomTokens:
    """A `Loader` without data behind it: endless micro-batches of random tokens [micro_batch, context]."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        self.micro_batches_per_step = cfg.trainer.global_batch // cfg.trainer.micro_batch
        self.shape = (cfg.trainer.micro_batch, cfg.trainer.context)
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.should_stop: Callable[[], bool] = lambda: False

    def __iter__(self) -> Generator[Batch]:
        lanes = {row: first_state(row) for row in range(self.shape[0])}
        while True:
            tokens = torch.randint(self.vocab_size, self.shape, generator=self.generator)
            yield Batch(tokens, tokens.roll(-1, 1), lanes=lanes)

    def rewind(self) -> None:
        """Does nothing: these batches never wait, so every step is complete."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def build_trainer(cfg: Config, vocab_size: int, world: World, folder: str) -> Trainer:
    """The trainer that train.py would build, but on random tokens and without a log.

    `train_step` and `flush` write nothing; `folder` is where `save` would.
    """
    model = build_model(cfg.model, vocab_size)
    model.init_weights(cfg.seed)
    model = parallelize(model, cfg.trainer, world).train()
    return Trainer(
        cfg,
        model,
        build_optimizer(model, cfg),
        RandomTokens(cfg, vocab_size),
        Checkpointer(folder),
        Metrics(folder, cfg, main=False),
        world,
        run_dir=folder,
        merge_states=merge_states,
    )


def measure(settings: dict[str, Any]) -> Measured:
    """Train one model at one context in this process, and return its measurements.

    Raises:
        TrainingError: the loss or the gradient norm is not finite.
    """
    cfg = config_of(settings)
    world = processes.init(cfg.trainer)
    processes.seed_everything(cfg.seed, cfg.trainer.deterministic)
    before = machine.current_rss()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, settings["vocab_size"], world, folder)
        batches = iter(trainer.loader)

        def step() -> float:
            """Seconds of one optimizer step; `flush` waits for the device and checks that the loss is finite."""
            start = time.perf_counter()
            trainer.train_step(batches)
            trainer.flush()
            return time.perf_counter() - start

        first = step()
        seconds = [step() for _ in range(settings["steps"])]
    if world.device.type == "cuda":
        memory, name = torch.cuda.max_memory_allocated(world.device), torch.cuda.get_device_name(world.device)
    else:
        memory, name = machine.peak_rss() - before, machine.processor_name()
    # Only after memory has been read, because measuring the peak rate allocates.
    peak, origin = machine.peak_flops(world.device, world.precision, settings["peak_tflops"])
    tokens_per_s = cfg.trainer.global_batch * cfg.trainer.context / statistics.median(seconds)
    flops = flops_per_token(trainer.model, cfg.trainer.context)
    processes.shutdown()
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * flops / peak,
        "peak_memory_bytes": memory,
        "step_s": seconds,
        "first_step_s": first,
        "flops_per_token": flops,
        "peak_tflops": peak / 1e12,
        "peak_is_from": origin,
        "device": name,
        "precision": world.precision,
    }


def child(settings: dict[str, Any]) -> int:
    """Measure, and print one line of JSON: the measurements, or the error."""
    try:
        result = measure(settings)
    except (torch.OutOfMemoryError, MemoryError):
        result = {"error": OUT_OF_MEMORY}
    except Exception as error:
        memory = "can't allocate memory" in str(error)  # torch's CPU allocator raises a plain RuntimeError
        result = {"error": OUT_OF_MEMORY if memory else f"{type(error).__name__}: {one_line(error)}"}
    print(json.dumps(result), flush=True)
    return 0


# --- in the parent ---------------------------------------------------------------------------------------------------


def run_child(settings: dict[str, Any], timeout_s: float) -> Measured:
    """Run one measurement in a process of its own; returns {"error": reason} if it failed."""
    command = [sys.executable, "-m", "eval.bench.models", "--child", json.dumps(settings)]
    try:
        done = subprocess.run(command, cwd=CONFIG_DIR.parent, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than timeout_s={timeout_s:g}"}
    if done.returncode == SIGKILL:
        return {"error": OUT_OF_MEMORY}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        return {"error": f"ended with status {done.returncode}: {said[:300]}"}
    return json.loads(lines[-1])


def line(row: Measured) -> str:
    """One measurement as a line of the table."""
    head = f"{row['model']:<16} {style.short(row['context']):>7}"
    if "error" in row:
        return f"{head}  {row['error']}"
    share = f"{row['mfu']:.1%}" if row["mfu"] <= 1 else ">100%"  # the peak was measured while the cores were busy
    return (
        f"{head} {row['tokens_per_s']:>12,.0f} {share:>7} {row['peak_memory_bytes'] / 2**30:>10.3f} "
        f"{statistics.median(row['step_s']):>9.3f} {row['first_step_s']:>9.2f}"
    )


HEAD = f"{'model':<16} {'context':>7} {'tokens/s':>12} {'MFU':>7} {'memory GiB':>10} {'step s':>9} {'first s':>9}"


def plot(rows: list[Measured], title: str, out: Path) -> Path:
    """Plot tokens/s and peak memory against context, one curve per model; failed measurements are left out."""
    fig, axes = style.figure(panels=2, width=5.4)
    good = [row for row in rows if "error" not in row]
    for index, name in enumerate(dict.fromkeys(row["model"] for row in good)):
        own = [row for row in good if row["model"] == name]
        context = [row["context"] for row in own]
        curves = [row["tokens_per_s"] for row in own], [row["peak_memory_bytes"] / 2**30 for row in own]
        for ax, values in zip(axes, curves):
            ax.plot(context, values, marker="o", color=style.color(index), linestyle=style.line(index), label=name)
    for ax, label in zip(axes, ("tokens/s in training", "peak memory (GiB)")):
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        ax.set_ylabel(label)
        style.token_axis(ax, "context (tokens)")
    axes[0].set_title(title, loc="left")
    style.legend(axes[1])
    return style.save(fig, out)


@dataclass
class Options:
    models: list[str] = setting([], "models to measure, from configs/model; empty: all")
    size: str = setting("tiny", "model size, from configs/model/size", choices=tuple(options("model/size")))
    contexts: list[int] = setting([2048, 4096], "sequence lengths in tokens", at_least=1)
    steps: int = setting(3, "optimizer steps to time, after a first one", at_least=1)
    batch: int = setting(1, "sequences in a step", at_least=1)
    vocab_size: int = setting(16384, "vocabulary size", at_least=1)
    timeout_s: int = setting(1800, "seconds after which a measurement is abandoned", at_least=1)
    out: str = setting("runs/bench_models", "output folder", writes="folder")


def main(argv: list[str] | None = None) -> int:
    """The command line described in the module's docstring.

    Exit status 1 if a measurement failed for another reason than lack of memory.
    """
    argv = sys.argv[1:] if argv is None else argv
    return child(json.loads(argv[1])) if argv[:1] == ["--child"] else command_line(argv)


@command(Options, overrides=True)
def command_line(given: Options, overrides: list[str]) -> int:
    args = {**asdict(given), "overrides": overrides}
    shared = {key: args[key] for key in ("size", "steps", "batch", "vocab_size", "overrides")}
    plans = [
        {**shared, "model": name, "context": context, "peak_tflops": None}
        for name in named_models(given.models)
        for context in given.contexts
    ]
    for plan in plans:
        plan["peak_tflops"] = config_of(plan).trainer.peak_tflops
    return bench(plans, args, Path(given.out))


def bench(plans: list[dict[str, Any]], args: dict[str, Any], out: Path) -> int:
    """Run the measurements one after the other, printing and storing each result as it arrives."""
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"settings": args, "machine": machine.describe_machine(), "measured": []}
    print(HEAD, flush=True)
    peak: float | None = None
    for plan in plans:
        # The peak is measured once, in the first process, so that every MFU is relative to the same one.
        result = run_child({**plan, "peak_tflops": plan["peak_tflops"] or peak}, args["timeout_s"])
        peak = peak or result.get("peak_tflops")
        record["measured"].append({"model": plan["model"], "context": plan["context"], **result})
        print(line(record["measured"][-1]), flush=True)
        write_whole(out / "bench_models.json", json.dumps(record, indent=1) + "\n")
    good = [row for row in record["measured"] if "error" not in row]
    print(f"\n{out / 'bench_models.json'}")
    if good:
        title = f"size {args['size']}, batch {args['batch']}, {good[0]['precision']}, {good[0]['device']}"
        print(f"MFU is relative to {good[0]['peak_tflops']:.4g} TFLOP/s ({good[0]['peak_is_from']})")
        with reporting("the plot"):
            print(plot(good, title, out / "bench_models.png"))
    failed = [row for row in record["measured"] if row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY]
    if failed:
        print(f"error: {len(failed)} of {len(plans)} failed, see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
