"""Continue prompts with a trained run, in constant memory a token for models whose state is constant.

    python -m ovq.inference.generate run=runs/cpu_demo prompt="It was a dark"
    python -m ovq.inference.generate run=runs/a 'prompt=[One,Two]' tokens=64 temperature=0.8 top_p=0.95 seed=1
    python -m ovq.inference.generate run=runs/a file=book.txt num_centroids=16384
    python -m ovq.inference.generate run=runs/a interactive=true

Text appears as it is made; several prompts are continued together and printed when they are done. A prompt is read in
pieces, with the state carried along, so its length costs no memory beyond the state's. The same prompt, settings and
seed give the same text, whatever the batch and the pieces (up to the rounding of sums).

Shapes: B rows in a batch, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.build import is_task
from data.tokenizer import Tokenizer
from ovq import processes
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.inference.run import Run, RunOptions
from ovq.mixers.base import detach_state, other_capacity
from ovq.model import Transformer
from ovq.schema import setting

CUT = "\ufffd"  # what an incomplete character decodes to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep only the k most probable tokens; None: all.
        top_p: keep the fewest tokens, most probable first, that have this probability together (arXiv 1904.09751).
        min_p: keep tokens of at least this share of the largest probability (arXiv 2407.01082).
        seed: of the draws. A draw depends on the seed, the row and the number of tokens before it, on nothing else.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        legal = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "in 0 to 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (good, words) in legal.items():
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)} must be {words}")

    def choose(self, logits_V: Tensor, row: int, step: int) -> int:
        """The next token. `row` is the row's number, `step` the number of tokens chosen for it before."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        p_V = (logits_V.double() / self.temperature).softmax(-1).cpu().numpy()
        order = np.argsort(-p_V, kind="stable")
        sorted_p = p_V[order]
        keep = (sorted_p >= self.min_p * sorted_p[0]) & (np.cumsum(sorted_p) - sorted_p < self.top_p)
        if self.top_k is not None:
            keep[self.top_k :] = False
        # Cumulated in the order of ids: rounding that swaps two equally probable tokens then changes nothing.
        kept = np.sort(order[keep])
        total = np.cumsum(p_V[kept])
        uniform = np.random.default_rng((self.seed, row, step)).random()
        return int(kept[min(np.searchsorted(total, uniform * total[-1], side="right"), len(kept) - 1)])


@torch.inference_mode()
def continue_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    choose: Callable[[Tensor, int], list[int]],
    take: Callable[[int, int], bool],
    device: torch.device,
    piece: int = 2048,
) -> None:
    """Continue prompts of any lengths together, until all are done.

    Prompts are not padded: all are read up to the length of the shortest, and then each takes its own tokens as long as
    it has some, one a step, and after them the chosen ones. So prompts of similar length belong together.

    Args:
        prompts: the ids of each, at least one.
        choose: from the logits [B, V] of the next token, and its position, to a token for each row. Under torchrun, the
            main process's choice counts.
        take: called with a row and its new token; returns whether the row is done, and gets no more tokens.
        piece: tokens of a prompt in a forward pass.
    """

    def step(tokens: Sequence[Sequence[int]], state: Any) -> tuple[Tensor, Any]:
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        out = model(ids, state=state, return_state=True, logits_to_keep=1)
        return out.logits[:, -1], detach_state(out.state)

    done = [False] * len(prompts)
    at = min(map(len, prompts))
    state: Any = None
    logits = torch.empty(0)
    for start in range(0, at, piece):
        logits, state = step([prompt[start : min(start + piece, at)] for prompt in prompts], state)
    while True:
        # Ranks must agree on when to stop, also where their devices round differently.
        chosen = processes.on_main(lambda: choose(logits, at))  # noqa: B023 (called at once)
        following = []
        for row, prompt in enumerate(prompts):
            given = at < len(prompt)
            following.append([prompt[at] if given else chosen[row]])
            if not given and not done[row]:
                done[row] = take(row, chosen[row])
        if all(done):
            return
        at += 1
        logits, state = step(following, state)


@dataclass
class Growing:
    """The text of tokens as they come, without what may still change.

    Held back are a character whose bytes are not complete, and what may be the beginning of a stop string. `stopped` is
    whether a stop string was found; it is not part of the text.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    text: str = ""  # all of it that is certain
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)  # those after the ids of `_done`
    _done: str = ""

    def add(self, token: int) -> str:
        """Add a token; returns what became certain."""
        self._ids.append(token)
        whole = self._done + self.tokenizer.decode(self._ids)
        at = min((found for stop in self.stop if (found := whole.find(stop)) >= 0), default=None)
        if at is not None:
            self.stopped = True
            return self._to(whole[:at])
        if not whole.endswith(CUT):
            self._done, self._ids = whole, []
        return self._to(whole[: len(whole) - self._uncertain(whole)])

    def end(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._to(self._done + self.tokenizer.decode(self._ids))

    def _to(self, text: str) -> str:
        new, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return new

    def _uncertain(self, whole: str) -> int:
        cut = len(whole) - len(whole.rstrip(CUT))
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        begun = next(
            (n for n in range(min(longest, len(whole)), 0, -1) if any(s.startswith(whole[-n:]) for s in self.stop)), 0
        )
        return max(cut, begun)


def generate(
    run: Run,
    prompts: Sequence[str],
    *,
    tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch: int = 8,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """What a run makes of each prompt, without the prompt.

    Args:
        tokens: new tokens, at most. A row also ends at the separator, which ends a document, and at a stop string.
        sampling: None: `Sampling()`.
        stop: strings that end a text, of which they are no part.
        batch: rows that are continued together, those of similar length.
        show: called with each bit of text as it becomes certain; takes a single prompt.

    Raises:
        ConfigError: the run was trained on a generated task, whose ids stand for no text; an illegal value.
    """
    sampling, tokenizer = sampling or Sampling(), run.tokenizer
    if is_task(run.cfg):
        raise ConfigError(f"{run.run_dir} was trained on a generated task, whose ids stand for no text")
    if show is not None and len(prompts) != 1:
        raise ConfigError("text can be shown as it is made for a single prompt only")
    ids = [[tokenizer.separator_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    texts = [Growing(tokenizer, [s for s in stop if s]) for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(ids[row]))
    made = [0] * len(prompts)
    for first in range(0, len(order) if tokens > 0 else 0, batch):
        rows = order[first : first + batch]

        def take(index: int, token: int, rows: list[int] = rows) -> bool:
            row = rows[index]
            made[row] += 1
            new = texts[row].add(token)
            if show is not None and new:
                show(new)
            return made[row] >= tokens or token == tokenizer.separator_id or texts[row].stopped

        def choose(logits_BV: Tensor, at: int, rows: list[int] = rows) -> list[int]:
            # Counted from the end of the row's own prompt, so that the others of the batch change nothing.
            steps = [max(0, at - len(ids[row])) for row in rows]
            return [sampling.choose(logits_V, row, step) for logits_V, row, step in zip(logits_BV, rows, steps)]

        continue_prompts(
            *(run.model, [ids[row] for row in rows]),
            choose=choose,
            take=take,
            device=run.world.device,
            piece=run.cfg.eval.piece,
        )
    for text in texts:
        rest = text.end()
        if show is not None and rest:
            show(rest)
    return [text.text for text in texts]


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Options(RunOptions):
    prompt: list[str] | None = setting(None, "a text to continue, or several: [One,Two]")
    file: str | None = setting(None, "a file with the text to continue", paths=True)
    interactive: bool = setting(False, "read prompts from the terminal, one a line, until an empty one")
    tokens: int = setting(256, "new tokens, at most", at_least=1)
    temperature: float = setting(1.0, "divides the logits; 0: the most probable token", at_least=0)
    top_k: int | None = setting(None, "keep the k most probable tokens; null: all", at_least=1)
    top_p: float = setting(1.0, "keep the most probable tokens of this probability together", above=0, at_most=1)
    min_p: float = setting(0.0, "keep tokens of this share of the largest probability", at_least=0, at_most=1)
    seed: int = setting(0, "of the draws", at_least=0)
    stop: list[str] = setting([], "strings that end a text")
    batch: int = setting(8, "prompts continued together", at_least=1)
    piece: int | None = setting(None, "tokens of a prompt per forward pass", at_least=1)
    num_centroids: int | None = setting(None, "dictionary capacity, if not that of training", at_least=1)


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    if sum((options.prompt is not None, options.file is not None, options.interactive)) != 1:
        raise ConfigError("give one of prompt=..., file=... and interactive=true")
    prompts = list(options.prompt or [])
    if options.file is not None:
        try:
            prompts = [Path(options.file).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"file={options.file} cannot be read as text: {error}") from None
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.seed)
    run = options.open(overrides)
    try:
        with other_capacity(run.model.mixers(), options.num_centroids):
            if options.interactive:
                while prompt := ask():
                    respond(run, [prompt], options, sampling)
            else:
                respond(run, prompts, options, sampling)
    except ValueError as error:  # of the capacity
        raise ConfigError(f"num_centroids={options.num_centroids}: {error}") from None
    processes.shutdown()
    return 0


def ask() -> str:
    """A line from the terminal; empty at its end."""
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().rstrip("\n")


def respond(run: Run, prompts: list[str], options: Options, sampling: Sampling) -> None:
    """Print what the run makes of the prompts."""
    main = run.world.is_main

    def show(text: str) -> None:
        if main:
            print(text, end="", flush=True)

    alone = len(prompts) == 1
    if alone and options.file is None:
        show(prompts[0])
    texts = generate(
        *(run, prompts),
        tokens=options.tokens,
        sampling=sampling,
        stop=options.stop,
        batch=options.batch,
        show=show if alone else None,
    )
    if alone:
        show("\n")
    elif main:
        for prompt, text in zip(prompts, texts):
            print(f"{prompt}{text}\n")


if __name__ == "__main__":
    sys.exit(main())
