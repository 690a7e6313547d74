"""Inference on the CPU: how fast each named model reads a long text and then continues it, and the size of its state.

The section "inference" of `eval.bench.cpu`; one model at many contexts is `eval.bench.decode`, which shares `Reader`.
One sequence, float32, random weights and tokens. The text is read in pieces with carried state, and decoding is greedy.
Models take turns, piece by piece and token by token. The peer is full attention with a cache of all keys and values,
`std_att`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.build import build_tokenizer
from eval import style
from eval.bench.steps import Plan, config_of
from eval.bench.stopwatch import Stopwatch, Timing, ratio_in_turns, shown
from ovq.config import Config
from ovq.model import build_model, state_bytes

PEER = "std_att"
Row = dict[str, Any]


class Reader:
    """A model in evaluation mode with its state, and the text ahead of it.

    Args:
        tokens_BT: the text, int64 [1, T]. Its first piece is read twice, each time from an empty state, so that the
            first call can be a warm-up.
        piece: tokens a call reads.
        dtype: of weights and activations; the model is moved to the device of the text.
    """

    def __init__(self, cfg: Config, tokens_BT: Tensor, piece: int, dtype: torch.dtype = torch.float32) -> None:
        self.model = build_model(cfg.model, build_tokenizer(cfg).vocab_size).eval()
        self.model.init_weights(cfg.seed)
        self.model.to(tokens_BT.device, dtype)
        self.state: list[Any] | None = None
        first, *rest = tokens_BT.split(piece, dim=1)
        self._first, self._ahead = first, iter([first, first, *rest])
        self.next_BT = first[:, :0]

    def read(self, mark: Any = None) -> None:
        """Read the next piece."""
        tokens_BT = next(self._ahead)
        self.run(tokens_BT, None if tokens_BT is self._first else self.state)

    def write(self, mark: Any = None) -> None:
        """Append the likeliest next token."""
        self.run(self.next_BT, self.state)

    @torch.no_grad()
    def run(self, tokens_BT: Tensor, state: list[Any] | None) -> None:
        """Append tokens to a state, which becomes this reader's."""
        out = self.model(tokens_BT, state=state, return_state=True, logits_to_keep=1)
        assert out.logits is not None
        self.state, self.next_BT = out.state, out.logits.argmax(-1)


def rows(names: list[str], prefix: int, piece: int, decode: int, plan: Plan) -> Iterator[Row | str]:
    """A row per model, the peer first: it is measured even if it is not named.

    Args:
        prefix: tokens read before any is written.
        piece: tokens of a pass over the prefix.
        decode: tokens written and timed, after one that is not timed.
        plan: the size of the models and the overrides of their config.
    """
    names = list(dict.fromkeys([PEER, *names]))
    configs = {name: config_of(name, prefix, plan) for name in names}
    vocab_size = build_tokenizer(configs[PEER]).vocab_size
    tokens_BT = torch.randint(vocab_size, (1, prefix), generator=torch.Generator().manual_seed(0))
    readers = {name: Reader(cfg, tokens_BT, piece) for name, cfg in configs.items()}
    stopwatch, pieces = Stopwatch(torch.device("cpu")), -(-prefix // piece)
    read = stopwatch.turns({name: r.read for name, r in readers.items()}, seconds=0, least=pieces, most=pieces)
    able = {name: r.write for name, r in readers.items() if read[name].error is None}
    written = stopwatch.turns(able, seconds=0, least=decode, most=decode)
    for name, reader in readers.items():
        row: Row = {"model": name, "prefix": prefix}
        error = read[name].error or written[name].error
        if error is not None:
            yield row | {"error": error}
            continue
        row |= _measured(prefix, read[name], written[name], read[PEER], written.get(PEER, Timing()))
        yield row | {"state_bytes": state_bytes(reader.model, prefix, itemsize=4)}


def _measured(prefix: int, read: Timing, written: Timing, peer_read: Timing, peer_written: Timing) -> Row:
    return {
        "piece_ms": read.whole_ms,
        "token_ms": written.whole_ms,
        "prefill_tokens_per_s": prefix / sum(read.whole_ms) * 1e3,
        "token_median_ms": written.whole,
        "prefill_speedup": None if peer_read.error else sum(peer_read.whole_ms) / sum(read.whole_ms),
        "decode_speedup": ratio_in_turns(peer_written.whole_ms, written.whole_ms),
    }


HEAD = (
    f"{'model':<16} {'prefix':>7} {'prefill tokens/s':>17} {f'vs {PEER}':>11} {'decode ms/token':>16} "
    f"{f'vs {PEER}':>11} {'state MiB':>10}"
)


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row['model']:<16} {style.short(row['prefix']):>7}"
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['prefill_tokens_per_s']:>17,.0f} {shown(row['prefill_speedup'], '.2f', 'x'):>11} "
        f"{row['token_median_ms']:>16,.2f} {shown(row['decode_speedup'], '.2f', 'x'):>11} "
        f"{row['state_bytes'] / 2**20:>10,.3f}"
    )
