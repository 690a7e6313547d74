"""A trained run as a model of lm-evaluation-harness. Needs the package lm-eval, so import it only where it is used.

- Every text begins with the separator, like every training document; nothing is ever truncated.
- Context and continuation are encoded together, and the tokens after the context are scored. If a token spans the
  boundary, the continuation is encoded alone, so that exactly its text is always scored. Whitespace at the end of the
  context belongs to the continuation, as in the harness itself.
- An empty continuation has log-probability 0 and counts as greedy (an empty product).
- Requests of similar length share a batch and are padded on the right, after everything that is scored. Long rows are
  processed in pieces with carried state. The sizes of the batch and the pieces change a score by rounding only: by
  less than 1e-5 nats in float32, and by up to some hundredths of a nat in bf16.

Shapes: B rows in a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.answers import TOKENS_AT_ONCE, predict
from ovq.errors import ConfigError, one_line
from ovq.inference.generate import continue_prompts
from ovq.inference.losses import losses_by_position
from ovq.model import IGNORE, Transformer

GENERATED_TOKENS = 256  # if a task sets no limit; the harness's default
SPREAD = 32  # largest difference in length, in tokens, between prompts that are continued in one batch


class Tasks(TaskManager):
    """The harness's tasks and those of a folder; a task that cannot be loaded raises a `ConfigError`."""

    def load(self, task_list: Any) -> Any:
        """Load tasks by name; their data are read, and downloaded if necessary."""
        try:
            loaded = super().load(task_list)
            if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
                raise ValueError(f"{', '.join(unsafe)} would run code that the model wrote")
            return loaded
        except Exception as error:  # whatever a task's own code and its data may raise
            raise ConfigError(f"the tasks {task_list} cannot be loaded: {one_line(error)}") from error


def find_tasks(names: Sequence[str], include_path: str | None, metadata: dict[str, Any]) -> Tasks:
    """A manager that finds tasks, groups or tags by name, in the folder `include_path` and in the harness.

    Raises:
        ConfigError: a name is unknown.
    """
    if include_path:  # indexing the harness's own fourteen thousand tasks takes seconds
        own = Tasks(include_path=include_path, include_defaults=False, metadata=metadata)
        if set(names) <= set(own.all_tasks):
            return own
    every = Tasks(include_path=include_path, metadata=metadata)
    unknown = [name for name in names if name not in every.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-eval has no tasks {', '.join(unknown)}; list its own with: lm-eval ls tasks, add a folder of others "
            "with: include_path=DIR"
        )
    return every


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of request. With several processes, each runs every pass on its shard of the
    model, and all get the same answers.

    Args:
        model: in evaluation mode, on `device`.
        batch: rows per forward pass.
        piece: positions per forward pass; fewer where the logits of a batch would take too much memory.
        progress: show a bar on stderr if that is a terminal.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        batch: int = 8,
        piece: int = 2048,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self._model, self._text, self._device = model, tokenizer, device
        self._batch, self._piece, self._progress = batch, piece, progress

    @property
    def eot_token_id(self) -> int:
        """The separator, which precedes and ends every document."""
        return self._text.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the separator and a text; of the text alone if `add_special_tokens` is False."""
        before = [] if add_special_tokens is False else [self.eot_token_id]
        return [*before, *self._text.encode(string).tolist()]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the separator and a context (which may be empty), and ids of its continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before, whole = self.tok_encode(stripped), self.tok_encode(stripped + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): (log-probability of the continuation in nats, whether greedy decoding
        produces it)."""
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same for encoded requests (texts, context ids, continuation ids); a context has at least one id."""
        scores = [(0.0, True)] * len(requests)
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        asked = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        for batch in self._batches(asked, lengths, disable_tqdm):
            tokens_BT = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.int64)
            labels_BT = torch.full_like(tokens_BT, IGNORE)
            for row, index in enumerate(batch):
                _, context, continuation = requests[index]
                tokens_BT[row, : lengths[index]] = torch.tensor([*context, *continuation])
                labels_BT[row, len(context) : lengths[index]] = torch.tensor(continuation)
            piece = max(1, min(self._piece, TOKENS_AT_ONCE // len(batch)))
            predicted, log_p = predict(self._model, tokens_BT[:, :-1], labels_BT[:, 1:], self._device, piece)
            greedy = (predicted == labels_BT[:, 1:].numpy()).all(axis=1)
            for row, index in enumerate(batch):
                scores[index] = float(log_p[row].sum()), bool(greedy[row])
        return scores

    @torch.inference_mode()  # like `predict`: FSDP buffers created in inference mode cannot be written outside it
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole (text,) after its separator: every token is predicted once, from all
        tokens before it."""
        rows = [np.array(self.tok_encode(request.args[0]), np.int64) for request in requests]
        totals = [0.0] * len(rows)
        lengths = [len(row) for row in rows]
        asked = [i for i, length in enumerate(lengths) if length > 1]
        for batch in self._batches(asked, lengths, disable_tqdm):
            losses = losses_by_position(
                self._model,
                [rows[index] for index in batch],
                positions=lengths[batch[0]] - 1,
                piece=self._piece,
                device=self._device,
                should_stop=lambda: False,
            )
            assert losses is not None  # nothing could stop it
            for index, total in zip(batch, losses.sum(axis=1)):
                totals[index] = -float(total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each (context, settings), up to the first of the stop strings `until`, the separator,
        or `max_gen_toks` tokens. A stop string is not part of the answer.

        Raises:
            ConfigError: a task asks for sampling.
        """
        settings = [normalize_gen_kwargs(request.args[1], GENERATED_TOKENS) for request in requests]
        if any(each["do_sample"] for each in settings):
            raise ConfigError(
                "a task asks for sampling (do_sample, temperature), and only greedy decoding is supported"
            )
        stops = [[stop for stop in each["until"] if stop] for each in settings]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        answers = [""] * len(requests)

        added: list[list[int]] = [[] for _ in requests]

        def taker(batch: list[int]) -> Callable[[int, int], bool]:
            def take(row: int, token: int) -> bool:
                ids, index = added[batch[row]], batch[row]
                ids.append(token)
                over = len(ids) >= settings[index]["max_gen_toks"] or token == self.eot_token_id
                return over or any(stop in self._text.decode(ids) for stop in stops[index])

            return take

        asked = [i for i, each in enumerate(settings) if each["max_gen_toks"] > 0]
        for batch in self._batches(asked, [len(prompt) for prompt in prompts], disable_tqdm, SPREAD):
            continue_prompts(
                *(self._model, [prompts[i] for i in batch]),
                choose=lambda logits_BV, at: logits_BV.argmax(-1).tolist(),
                take=taker(batch),
                device=self._device,
                piece=self._piece,
            )
        for index in asked:
            text = self._text.decode(added[index])
            answers[index] = text[: min((at for stop in stops[index] if (at := text.find(stop)) >= 0), default=None)]
        return answers

    def _batches(
        self, indices: list[int], lengths: list[int], disable_tqdm: bool, spread: int | None = None
    ) -> Iterator[list[int]]:
        """Batches of indices, longest first, whose lengths differ by at most `spread` (None: no limit)."""
        left = sorted(indices, key=lambda index: -lengths[index])
        with tqdm(total=len(left), disable=None if self._progress and not disable_tqdm else True) as bar:
            while left:
                shortest = 0 if spread is None else lengths[left[0]] - spread
                batch = [index for index in left[: self._batch] if lengths[index] >= shortest]
                yield batch
                left = left[len(batch) :]
                bar.update(len(batch))
