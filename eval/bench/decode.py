"""Decoding speed and state size by context, for each named model: 1k to 1M tokens.

    python -m eval.bench.decode                                                  all models, on this machine
    python -m eval.bench.decode models=[sw_ovq,std_att] contexts=[1024,65536] threads=1
    python -m eval.bench.decode size=150m device=cuda contexts=[1024,16384,1048576]

One sequence, random weights and tokens. A model reads up to each context in turn, in pieces with carried state, and
then decodes tokens greedily, one at a time. Speeds are from medians over the last pieces before the context and over
the tokens; `mean ms` also reflects the tokens at which a memory takes in a chunk. The state is the size of the carried
tensors.

Full attention would take hours to read long contexts. Beyond `read_limit` tokens a model with a cache of all keys and
values gets a cache filled with random ones, and only the last piece is read, twice, of which the second time counts:
the table says "filled" instead of "read".

On a GPU a step is captured as a CUDA graph, and `mode=compile` compiles it on any device. Both repeat one step from
the same state, without a chunk's update. If that fails, a note says so and the step runs eagerly. The JSON has all
times, the machine and the command, and is rewritten after every row; a measurement that fails is a row with its error,
and the exit status is then 1.

Models have the settings of `experiment=cpu_demo`; a key with a dot is a setting of the run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data.build import build_tokenizer
from eval import style
from eval.bench.compare import named_models
from eval.bench.reading import Reader
from eval.bench.steps import Plan, config_of
from eval.bench.stopwatch import Stopwatch
from ovq import cpu
from ovq.cli import command
from ovq.compose import options as choices_of
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole
from ovq.machine import describe_machine, free_memory
from ovq.mixers.attention_layer import KVCache
from ovq.mixers.full_attention import FullAttention
from ovq.model import state_bytes
from ovq.schema import one_of, setting

LAST_PIECES = 3  # pieces whose median gives the reading speed at a context
WARM_UP = 2  # tokens written before those that are timed
Row = dict[str, Any]


@dataclass
class Options:
    models: list[str] = setting([], "models, from configs/model; empty: all")
    size: str = setting("tiny", "model size, from configs/model/size", choices=tuple(choices_of("model/size")))
    contexts: list[int] = setting(
        [1024, 8192, 65536, 1048576], "tokens of context at which writing is timed", at_least=1
    )
    piece: int = setting(4096, "maximum tokens per forward pass while reading the context", at_least=1)
    read_limit: int = setting(8192, "tokens up to which full attention reads instead of filling its cache", at_least=1)
    tokens: int = setting(144, "tokens written and timed at each context", at_least=1)
    device: str = one_of("auto", "cpu", "cuda", help="device to run on")
    dtype: str = one_of("auto", "float32", "bfloat16", help="of weights and activations; auto: bfloat16 on a GPU")
    mode: str = one_of(
        "auto", "eager", "graph", "compile", help="how a step is run; auto: a CUDA graph on a GPU, else eager"
    )
    threads: int | None = setting(None, "CPU threads; null: torch's default", at_least=1)
    out: str = setting("runs/bench_decode.json", "JSON file to write", writes="file")


def rows(name: str, given: Options, device: torch.device, overrides: list[str]) -> Iterator[Row | str]:
    """A row per context of a model, in ascending order, and notes on what could not be done."""
    contexts = sorted(set(given.contexts))
    cfg = config_of(name, contexts[-1], Plan(given.size, 1, 1, 0, tuple(overrides)))
    generator, vocab_size = torch.Generator().manual_seed(0), build_tokenizer(cfg).vocab_size
    text_BT = torch.randint(vocab_size, (1, contexts[-1]), generator=generator).to(device)
    by_device = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, by_device if given.dtype == "auto" else given.dtype)
    reader, watch, at = Reader(cfg, text_BT, given.piece, dtype), Stopwatch(device), 0
    reader.run(text_BT[:, : min(given.piece, contexts[0])], None)  # compiles, and warms up
    state: list[Any] | None = None
    for context in contexts:
        row: Row = {"model": name, "context": context}
        need, free = state_bytes(reader.model, context, itemsize=dtype.itemsize), free_memory(device)
        if need > free:
            yield row | {"error": f"the state takes {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"}
            return
        try:
            filled = context > max(given.read_limit, given.piece) and _keeps_all(reader)
            start = context - given.piece if filled else at
            if filled:
                assert reader.state is not None  # of the warm-up, at least
                state = [_fill(mixer, held, start) for mixer, held in zip(reader.model.mixers(), reader.state)]
                reader.run(text_BT[:, start:context], state)  # a shape that was not seen before
            times: list[tuple[int, float]] = []
            for begin in range(start, context, given.piece):
                part_BT, before = text_BT[:, begin : min(begin + given.piece, context)], state
                ms = watch.once(lambda mark: reader.run(part_BT, before))[1]  # noqa: B023 (called at once)
                state, times = reader.state, [*times, (part_BT.shape[1], ms)]
            at = context
            row |= {"reached": "filled" if filled else "read", "piece_ms": [ms for _, ms in times]}
            row["prefill_tokens_per_s"] = statistics.median(n / ms * 1e3 for n, ms in times[-LAST_PIECES:])
            row["state_bytes"] = _bytes_of(state)
            mode = given.mode if given.mode != "auto" else "graph" if device.type == "cuda" else "eager"
            step, note = _step(reader, mode)
            if note:
                yield f"{name} at {style.short(context)}: {note}"
            for _ in range(WARM_UP):
                step()
            token_ms = [watch.once(lambda mark: step())[1] for _ in range(given.tokens)]  # noqa: B023
        except (RuntimeError, MemoryError) as error:  # out of memory: a result like any other
            yield row | {"error": f"{type(error).__name__}: {one_line(error)}"[:300]}
            return
        row |= {"mode": "eager" if note else mode, "token_ms": token_ms}
        row["decode_tokens_per_s"] = 1e3 / statistics.median(token_ms)
        yield row | {"token_median_ms": statistics.median(token_ms), "token_mean_ms": statistics.fmean(token_ms)}


def _keeps_all(reader: Reader) -> bool:
    """Whether a layer caches all keys and values, and the states of all others are key/value caches, too."""
    mixers = reader.model.mixers()
    return any(isinstance(m, FullAttention) for m in mixers) and all(isinstance(s, KVCache) for s in reader.state or [])


def _fill(mixer: torch.nn.Module, held: KVCache, tokens: int) -> KVCache:
    """A layer's cache after `tokens` tokens: random keys and values for full attention, those it has for a window."""
    if not isinstance(mixer, FullAttention):
        return KVCache(held.key, held.value, tokens)
    _, _, G, K = held.key.shape
    key, value = (held.key.new_empty(1, tokens, G, K).normal_() for _ in range(2))
    return KVCache(key, value, tokens)


def _bytes_of(state: Any) -> int:
    """Bytes of the tensors of a state."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def _same_token(reader: Reader) -> Callable[..., Tensor]:
    """A call that writes the same token after the same context each time, with the model or what it is compiled to."""
    reader.write()  # from here on, caches have room for more tokens
    model, state, token_BT = reader.model, reader.state, reader.next_BT
    rooms = [(cache.room, cache.key.shape[1]) for cache in state or [] if isinstance(cache, KVCache) and cache.room]

    @torch.no_grad()
    def once(run: Callable[..., Any] = model) -> Tensor:
        for room, used in rooms:  # give back what the last call took: else it would copy all keys and values
            room.used = used
        return run(token_BT, state=state, return_state=True, logits_to_keep=1).logits.argmax(-1)

    return once


def _step(reader: Reader, mode: str) -> tuple[Callable[[], object], str]:
    """A call that writes a token, and a note if it cannot run in `mode`."""
    if mode == "eager":
        return reader.write, ""
    once = _same_token(reader)
    try:
        if mode == "compile":
            compiled = torch.compile(reader.model)
            once(compiled)
            return lambda: once(compiled), ""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first call creates must exist before the capture
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        return graph.replay, ""
    except Exception as error:  # of the compiler, or an operator that cannot be captured
        return reader.write, f"mode={mode} failed, so the step runs eagerly: {one_line(error)}"[:300]


HEAD = (
    f"{'model':<16} {'context':>8} {'reached':>8} {'prefill tokens/s':>17} {'decode tokens/s':>16} {'median ms':>10} "
    f"{'mean ms':>8} {'state MiB':>10}"
)


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row['model']:<16} {style.short(row['context']):>8}"
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['reached']:>8} {row['prefill_tokens_per_s']:>17,.0f} {row['decode_tokens_per_s']:>16,.1f} "
        f"{row['token_median_ms']:>10,.2f} {row['token_mean_ms']:>8,.2f} {row['state_bytes'] / 2**20:>10,.3f}"
    )


@command(Options, overrides=True)
def main(given: Options, overrides: list[str]) -> int:
    """The command line described in the module's docstring."""
    torch.set_num_threads(given.threads or torch.get_num_threads())
    cpu.keep_freed_memory()
    names = named_models(given.models)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use device=cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    device, machine, out = torch.device(kind), describe_machine(), Path(given.out)
    record: dict[str, Any] = {"machine": machine, "settings": asdict(given) | {"overrides": overrides}}
    record |= {"finished": False, "notes": [], "rows": []}
    on = machine["accelerator"] if kind == "cuda" else f"{machine['processor']}, {machine['threads']} threads"
    print(f"{on}, torch {machine['torch']}, load {machine['load_1min']}\n{HEAD}", flush=True)
    for name in names:
        for row in rows(name, given, device, overrides):
            if isinstance(row, str):
                record["notes"].append(row)
                print(f"  note: {row}", flush=True)
            else:
                record["rows"].append(row)
                print(line(row), flush=True)
            write_whole(out, json.dumps(record, indent=1) + "\n")
    record["finished"] = True
    write_whole(out, json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {out}")
    if failed := sum("error" in row for row in record["rows"]):
        print(f"error: {failed} of {len(record['rows'])} measurements failed, see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
