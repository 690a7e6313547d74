"""Continue prompts with a trained model, in constant memory if the size of its state is constant.

    python -m ovq.inference.generate run=runs/cpu_demo prompt="It was a dark"
    python -m ovq.inference.generate run=runs/a 'prompt=[One,Two]' tokens=64 temperature=0.8 top_p=0.95 seed=1
    python -m ovq.inference.generate run=runs/a file=book.txt num_centroids=16384         one prompt: the whole file
    python -m ovq.inference.generate run=runs/a prompts=many.jsonl json=true > texts.jsonl    many prompts, for scripts
    python -m ovq.inference.generate run=runs/a interactive=true

Text appears as it is generated; several prompts are continued together and printed when all are done. A prompt is read
in pieces, with the state carried from one to the next, so its length costs no memory beyond the state's. The same
prompts, settings and seed give the same texts, whatever `batch` and `piece` are (up to the rounding of sums).

`prompts` is a text file with one prompt per line, or JSON lines (*.jsonl): strings, or objects with a "prompt"; blank
lines are skipped. With `json=true` each prompt gives one line {"prompt", "text", "tokens", "finish"}, where finish is
"length" (`tokens` new tokens), "stop" (a stop string) or "end" (the model ended the document).

Shapes: B rows in a batch, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.build import is_task
from data.contents import BOM
from data.tokenizer import Tokenizer
from ovq import processes
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.inference.run import Run, RunOptions, at_capacity
from ovq.inference.sampling import Sampling
from ovq.machine import free_memory
from ovq.mixers.base import detach_state
from ovq.model import Transformer, state_bytes
from ovq.schema import setting

CUT = "\ufffd"  # what an incomplete character decodes to


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

    Prompts are not padded: all are read up to the length of the shortest. Then every row takes one token per step, from
    its prompt as long as that lasts and then the chosen one. So batch prompts of similar length.

    Args:
        prompts: the token ids of each prompt, at least one.
        choose: maps the logits [B, V] of the next token, and its position, to a token for each row. Under torchrun, all
            processes use the main process's choice.
        take: called with a row and its new token; returns whether the row is done, so that it gets no more tokens.
        piece: prompt tokens per forward pass.
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
        # Ranks must agree on when to stop, even if their devices round differently.
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
    """The text of a growing sequence of tokens, without what may still change.

    A character whose bytes are incomplete is held back, and so is what may be the beginning of a stop string. `stopped`
    is whether a stop string was found; the stop string is not part of the text.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    text: str = ""  # the part that is certain
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)  # those whose text is not in `_done` yet
    _done: str = ""

    def add(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        self._ids.append(token)
        whole = self._done + self.tokenizer.decode(self._ids)
        certain = len(self.text)  # no stop string begins before here
        at = min((found for stop in self.stop if (found := whole.find(stop, certain)) >= 0), default=None)
        if at is not None:
            self.stopped = True
            return self._to(whole[:at])
        if not whole.endswith(CUT):
            self._done, self._ids = whole, []
        return self._to(whole[: len(whole) - self._uncertain(whole)])

    def end(self) -> str:
        """End the text; returns what was held back."""
        return "" if self.stopped else self._to(self._done + self.tokenizer.decode(self._ids))

    def _to(self, text: str) -> str:
        new, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return new

    def _uncertain(self, whole: str) -> int:
        known = whole.rstrip(CUT)  # a stop string may continue with the character that is incomplete
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        begun = next(
            (n for n in range(min(longest, len(known)), 0, -1) if any(s.startswith(known[-n:]) for s in self.stop)), 0
        )
        return len(whole) - len(known) + begun


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt: its text, the number of tokens generated, and why it ends: length | stop | end."""

    text: str
    tokens: int
    finish: str


def generate(
    run: Run,
    prompts: Sequence[str],
    *,
    tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch: int = 8,
    show: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Continue each prompt; returns the continuations, without the prompts.

    Args:
        prompts: texts, none of them empty.
        tokens: maximum number of new tokens. A row also ends at the separator, which ends a document, and at a stop
            string.
        sampling: None: `Sampling()`.
        stop: strings that end a text; they are not part of it.
        batch: maximum number of rows continued together; they have similar lengths (see `batches_of`).
        show: called with each new bit of text as it becomes certain; only for a single prompt.

    Raises:
        ConfigError: the run was trained on a generated task, whose ids stand for no text; an empty prompt or stop
            string; or a prompt so long that its state does not fit into memory.
    """
    sampling, tokenizer, device = sampling or Sampling(), run.tokenizer, run.world.device
    if is_task(run.cfg):
        raise ConfigError(f"{run.run_dir} was trained on a generated task, whose ids stand for no text")
    if show is not None and len(prompts) != 1:
        raise ConfigError("text can be shown as it is made for a single prompt only")
    check_prompts(prompts, stop)
    ids = [[tokenizer.separator_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    texts = [Growing(tokenizer, stop) for _ in prompts]
    made, finish = [0] * len(prompts), ["length"] * len(prompts)
    for rows in batches_of([len(row) for row in ids], batch, tokens) if tokens > 0 else ():
        check_memory(run, max(len(ids[row]) for row in rows) + tokens, len(rows))
        seen_BV = None
        if sampling.repetition_penalty != 1:
            seen_BV = torch.zeros(len(rows), tokenizer.vocab_size, dtype=torch.bool, device=device)
            for index, row in enumerate(rows):
                seen_BV[index, torch.tensor(ids[row], device=device)] = True

        def take(index: int, token: int, rows: list[int] = rows, seen_BV: Tensor | None = seen_BV) -> bool:
            row = rows[index]
            made[row] += 1
            if seen_BV is not None:
                seen_BV[index, token] = True
            new = texts[row].add(token)
            if show is not None and new:
                show(new)
            if texts[row].stopped or token == tokenizer.separator_id:
                finish[row] = "stop" if texts[row].stopped else "end"
                return True
            return made[row] >= tokens

        def choose(logits_BV: Tensor, at: int, rows: list[int] = rows, seen_BV: Tensor | None = seen_BV) -> list[int]:
            # Counted from the end of the row's own prompt, so that the batch's other rows make no difference.
            steps = [max(0, at - len(ids[row])) for row in rows]
            seen = [None] * len(rows) if seen_BV is None else seen_BV
            return [sampling.choose(*each) for each in zip(logits_BV, rows, steps, seen)]

        continue_prompts(
            *(run.model, [ids[row] for row in rows]),
            choose=choose,
            take=take,
            device=device,
            piece=run.cfg.eval.piece,
        )
    for text in texts:
        rest = text.end()
        if show is not None and rest:
            show(rest)
    return [Continuation(text.text, tokens, reason) for text, tokens, reason in zip(texts, made, finish)]


def check_texts(texts: Sequence[str]) -> None:
    """Raise ConfigError if a text cannot be encoded."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"this is not text: character {error.start + 1} is half a surrogate pair") from None


def check_prompts(prompts: Sequence[str], stop: Sequence[str]) -> None:
    """Raise ConfigError if a prompt or a stop string is empty, or a prompt cannot be encoded."""
    check_texts(prompts)
    if "" in prompts:
        raise ConfigError("the prompt is empty; give it some text, a line break at least")
    if "" in stop:
        raise ConfigError("stop holds an empty string, which would end every text at once")


def batches_of(lengths: Sequence[int], batch: int, tokens: int) -> Iterator[list[int]]:
    """Rows in batches of at most `batch`, the shortest prompts first.

    What a prompt has beyond the length of the shortest in its batch is read one token at a time, so lengths in a batch
    differ by at most `tokens`, the number of steps that generation takes anyway.
    """
    left = sorted(range(len(lengths)), key=lambda row: lengths[row])
    while left:
        rows = [row for row in left[:batch] if lengths[row] - lengths[left[0]] <= tokens]
        yield rows
        left = left[len(rows) :]


def check_memory(run: Run, context: int, rows: int) -> None:
    """Refuse contexts whose state does not fit into memory: that of full attention grows with every token.

    Raises:
        ConfigError: the state of `rows` sequences of `context` tokens takes more memory than is free.
    """
    need = rows * state_bytes(run.model, context, itemsize=run.world.itemsize)
    free = free_memory(run.world.device)
    if need > free:
        raise ConfigError(
            f"the state of {rows} x {context:,} tokens takes {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are "
            f"free; give a shorter prompt, fewer tokens or a smaller batch, or use a model whose state is constant"
        )


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Options(RunOptions):
    prompt: list[str] | None = setting(None, "a text to continue, or several: [One,Two]", text=True)
    file: str | None = setting(None, "a file with the text to continue", paths=True)
    prompts: str | None = setting(None, "a file of prompts: one per line, or JSON lines (*.jsonl)", paths=True)
    interactive: bool = setting(False, "read prompts from the terminal, one per line, until an empty one")
    tokens: int = setting(256, "new tokens, at most", at_least=1)
    temperature: float = setting(1.0, "divides the logits; 0: the most probable token", at_least=0)
    top_k: int | None = setting(None, "keep the k most probable tokens; null: all", at_least=1)
    top_p: float = setting(1.0, "sample from the fewest tokens with this total probability", above=0, at_most=1)
    min_p: float = setting(
        0.0, "drop tokens less probable than this share of the most probable one", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "divides the logits of tokens that have occurred; 1: none", at_least=0.01, at_most=100
    )
    seed: int = setting(0, "random seed of sampling", at_least=0)
    stop: list[str] = setting([], "strings that end a text", text=True)
    batch: int = setting(8, "prompts continued together, at most", at_least=1)
    piece: int | None = setting(None, "tokens of a prompt per forward pass", at_least=1)
    json: bool = setting(False, "print a line of JSON for each prompt when all are done, and nothing else")


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line shown in the module docstring."""
    prompts = prompts_of(options)
    check_prompts(prompts, options.stop)
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
        options.seed,
    )
    run = options.open(overrides, writes=False, own=["batch"])
    with at_capacity(run.model, run.cfg):
        if options.interactive:
            while prompt := processes.on_main(ask):
                respond(run, [prompt], options, sampling)
        else:
            respond(run, prompts, options, sampling)
    processes.shutdown()
    return 0


def prompts_of(options: Options) -> list[str]:
    """The prompts that the options give, without those to be typed at a terminal.

    Raises:
        ConfigError: not exactly one source of prompts, or a file that has none or cannot be read.
    """
    sources = (options.prompt is not None, options.file is not None, options.prompts is not None, options.interactive)
    if sum(sources) != 1:
        raise ConfigError("give one of prompt=..., file=..., prompts=... and interactive=true")
    if options.file is not None:
        return [_text_of("file", options.file)]
    if options.prompts is None:
        return list(options.prompt or [])
    lines = [(number, line) for number, line in enumerate(_text_of("prompts", options.prompts).split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ConfigError(f"prompts={options.prompts} holds no prompt")
    if not options.prompts.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    return [_prompt_of(line, f"line {number} of prompts={options.prompts}") for number, line in lines]


def _text_of(option: str, path: str) -> str:
    """The text of a file as data=text reads it: line endings as they are, without a byte-order mark."""
    try:
        return Path(path).read_bytes().removeprefix(BOM).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}={path} cannot be read as text: {error}") from None


def _prompt_of(line: str, where: str) -> str:
    """The prompt in a line of JSON."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where} must be a text or an object with one under "prompt", and not empty')
    return prompt


def ask() -> str:
    """A line from the terminal; empty at the end of the input."""
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().rstrip("\n")


def respond(run: Run, prompts: list[str], options: Options, sampling: Sampling) -> None:
    """Print the continuations of the prompts."""
    main = run.world.is_main

    def show(text: str) -> None:
        if main:
            print(text, end="", flush=True)

    streams = len(prompts) == 1 and not options.json
    if streams and prompts[0] and options.file is None:
        show(prompts[0])
    found = generate(
        *(run, prompts),
        tokens=options.tokens,
        sampling=sampling,
        stop=options.stop,
        batch=options.batch,
        show=show if streams else None,
    )
    if streams:
        show("\n")
    for prompt, each in zip(prompts, found) if not streams else ():
        show(f"{json.dumps({'prompt': prompt, **asdict(each)})}\n" if options.json else f"{prompt}{each.text}\n\n")


if __name__ == "__main__":
    sys.exit(main())
