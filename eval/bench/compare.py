"""A table of all named models: parameters, FLOPs per token, and the size of their state by context.

    python -m eval.bench.compare size=70m context=65536
    python -m eval.bench.compare size=150m models=[std_att,sw_nope,sw_ovq] vocab_size=32768 out=runs/compare_150m
    python -m eval.bench.compare readme=true        rewrite the table of models in README.md

Models are built on the meta device, so nothing is allocated and the table takes seconds. Compared models must have the
same number of parameters without embedding and head as the first one, within `tolerance`; if they do not, one line
names those that differ and the exit status is 1. State is that of one sequence over all layers; its bytes assume
activations in bf16 and sums in float32. compare_models.json and state_size.png (as in arXiv 2602.03922, figure 4,
right) are written to `out`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eval import style
from ovq import machine
from ovq.cli import command
from ovq.compose import CONFIG_DIR, compose, options
from ovq.errors import ConfigError
from ovq.files import write_whole
from ovq.model import build_model, count_parameters, flops_per_token, state_bytes, state_size
from ovq.plan import CONTEXTS, format_bytes
from ovq.report import reporting
from ovq.schema import setting

README = CONFIG_DIR.parent / "README.md"
README_SIZE = "70m"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"


@dataclass(frozen=True)
class ModelCosts:
    """The costs of one model; FLOPs per token are averaged over a sequence of the table's context."""

    name: str
    layers: str
    parameters: int
    parameters_body: int  # without embedding and head
    flops_forward: float
    flops_training: float
    state_numbers: dict[int, int]  # elements, by context
    state_bytes: dict[int, int]


def named_models(chosen: list[str]) -> list[str]:
    """The chosen options of configs/model, or all of them with full attention, the baseline, first.

    Raises:
        ConfigError: an option does not exist.
    """
    legal = options("model")
    for name in chosen:
        if name not in legal:
            raise ConfigError(f"models: '{name}' does not exist; legal: {', '.join(legal)}")
    return chosen or sorted(legal, key=lambda name: (name != "std_att", name))


def costs(name: str, size: str, vocab_size: int, context: int, contexts: list[int]) -> ModelCosts:
    """The costs of a named model: FLOPs at `context`, state at each of `contexts`."""
    cfg = compose([f"model={name}", f"model/size={size}"])
    with torch.device("meta"):
        model = build_model(cfg.model, vocab_size)
    total, body = count_parameters(model)
    forward, training = (flops_per_token(model, context, training=training) for training in (False, True))
    return ModelCosts(
        name=name,
        layers=", ".join(cfg.model.pattern),
        parameters=total,
        parameters_body=body,
        flops_forward=forward,
        flops_training=training,
        state_numbers={c: state_size(model, c) for c in contexts},
        state_bytes={c: state_bytes(model, c) for c in contexts},
    )


def unmatched(models: list[ModelCosts], tolerance: float) -> list[str]:
    """Models whose parameter count differs from the first one's by more than `tolerance`, as 'name +3.1%'."""
    first = models[0].parameters_body
    off = [(model.name, model.parameters_body / first - 1) for model in models]
    return [f"{name} {share:+.1%}" for name, share in off if abs(share) > tolerance]


def table(models: list[ModelCosts], context: int) -> str:
    """The results as text, a row per model: counts with the state in elements, then the state in bytes."""
    contexts = list(models[0].state_numbers)
    first = models[0].parameters_body
    head = ["model", "parameters", "without embedding/head", "", "forward", "training"]
    rows = [head + [style.short(c) for c in contexts]]
    for m in models:
        counts = [f"{m.parameters:,}", f"{m.parameters_body:,}", f"{m.parameters_body / first - 1:+.2%}"]
        flops = [_short(m.flops_forward), _short(m.flops_training)]
        rows.append([m.name, *counts, *flops, *(_short(m.state_numbers[c]) for c in contexts)])
    sizes = [["", *(style.short(c) for c in contexts)]]
    sizes += [[m.name, *(format_bytes(m.state_bytes[c]) for c in contexts)] for m in models]
    return "\n".join(
        [
            f"parameters (and difference from {models[0].name}), FLOPs per token at context {context:,}, "
            "and elements of one sequence's state by context",
            *_aligned(rows),
            "",
            "bytes of one sequence's state by context, activations in bf16",
            *_aligned(sizes),
        ]
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]


def _short(number: float) -> str:
    """1190000000 -> '1.19G', by powers of 1000."""
    power = min(4, int(math.log10(max(1.0, number))) // 3)
    return f"{number / 1000**power:.4g}{('', 'k', 'M', 'G', 'T')[power]}"


def plot(models: list[ModelCosts], size: str, out: Path) -> Path:
    """Plot state against context. Models with the same state at every context share a curve."""
    curves: dict[tuple, list[str]] = {}
    for m in models:
        curves.setdefault(tuple(m.state_bytes.items()), []).append(m.name)
    fig, (ax,) = style.figure(width=7.6, height=4.6)
    from matplotlib.ticker import FuncFormatter, LogLocator

    for index, (points, names) in enumerate(curves.items()):
        ax.plot(*zip(*points), color=style.color(index), linestyle=style.line(index), label=", ".join(names))
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_locator(LogLocator(base=4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    ax.set_ylabel("state of one sequence (bf16, sums float32)")
    ax.set_title(f"size {size}", loc="left")
    style.token_axis(ax, "context (tokens)")
    style.legend(ax)
    return style.save(fig, out)


# --- README ----------------------------------------------------------------------------------------------------------


def readme_table() -> str:
    """The README's table of models in Markdown: a row per option of configs/model, described by its first comment."""
    lines = [
        f"| `model=` | layers | state of one sequence, 2k to 64k tokens ({README_SIZE}) | source |",
        "| --- | --- | --- | --- |",
    ]
    for name in named_models([]):
        comment = (CONFIG_DIR / "model" / f"{name}.yaml").read_text().split("\n", 1)[0].lstrip("# ").rstrip(".")
        papers = re.findall(r"arXiv \d{4}\.\d{5}", comment)
        what = re.sub(r" \([^()]*arXiv[^()]*\)", "", comment)
        with torch.device("meta"):
            model = build_model(compose([f"model={name}", f"model/size={README_SIZE}"]).model, vocab_size=256)
        low, high = (format_bytes(state_bytes(model, context)) for context in (CONTEXTS[0], CONTEXTS[-1]))
        state = f"{low}, constant" if low == high else f"{low} to {high}"
        lines.append(f"| `{name}` | {what} | {state} | {', '.join(papers)} |")
    return "\n".join(lines) + "\n"


def write_readme(path: Path = README) -> None:
    """Rewrite the table of models in `path`, between its two markers.

    Raises:
        ConfigError: a marker is missing.
    """
    text = path.read_text()
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ConfigError(f"{path} lacks the lines '{BEGIN.strip()}' and '{END.strip()}' around the table")
    write_whole(path, before + found + readme_table() + ended + after)


# --- the command line ------------------------------------------------------------------------------------------------


@dataclass
class Options:
    size: str = setting(README_SIZE, "model size, from configs/model/size", choices=tuple(options("model/size")))
    context: int = setting(65536, "sequence length in tokens, for FLOPs per token", at_least=1)
    models: list[str] = setting([], "models to compare, from configs/model; empty: all")
    vocab_size: int = setting(16384, "vocabulary size", at_least=1)
    tolerance: float = setting(0.02, "largest relative difference from the first model's parameter count", at_least=0)
    out: str = setting("runs/compare_models", "output folder", writes="folder")
    readme: bool = setting(False, "only rewrite the table of models in README.md")


@command(Options)
def main(args: Options) -> int:
    """The command line described in the module's docstring."""
    if args.readme:
        write_readme()
        print(README)
        return 0
    contexts = sorted({*CONTEXTS, args.context})
    models = [costs(name, args.size, args.vocab_size, args.context, contexts) for name in named_models(args.models)]
    print(table(models, args.context))
    out = Path(args.out)
    off = unmatched(models, args.tolerance)
    record = {
        **{key: getattr(args, key) for key in ("size", "context", "vocab_size", "tolerance")},
        "unmatched": off,
        "models": [asdict(model) for model in models],
        "machine": machine.describe_machine(),
    }
    write_whole(out / "compare_models.json", json.dumps(record, indent=1) + "\n")
    print(f"\n{out / 'compare_models.json'}")
    with reporting("the plot"):
        print(plot(models, args.size, out / "state_size.png"))
    if off:
        print(
            f"error: parameters without embedding and head differ by more than {args.tolerance:.0%} from "
            f"{models[0].name}'s {models[0].parameters_body:,}: {', '.join(off)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
