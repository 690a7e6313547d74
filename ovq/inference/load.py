"""A trained model in Python: `ovq.load`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.inference.generate import check_texts, generate
from ovq.inference.losses import losses_by_position
from ovq.inference.run import Run, load_run
from ovq.inference.sampling import Sampling
from ovq.mixers.base import with_dictionaries
from ovq.model import Transformer


class LoadedModel:
    """A trained model with its tokenizer.

    Attributes:
        module: the torch module, in evaluation mode: ids [B, T] -> `ModelOutput`.
        tokenizer: text to ids and back; for a generated task, its symbols.
        cfg, step: the run's config, and the training step of the weights.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.module: Transformer = run.model
        self.tokenizer: Tokenizer = run.tokenizer
        self.cfg: Config = run.cfg
        self.step: int = run.step

    def loss(self, text: str) -> float:
        """Mean loss of the text's tokens, in nats per token.

        Raises:
            ConfigError: the text has no tokens.
        """
        return float(self.loss_by_position(text).mean())

    def loss_by_position(self, text: str, context: int | None = None) -> np.ndarray:
        """Loss in nats of each of the text's tokens, float64 [tokens]; the first is predicted from the separator.

        Args:
            context: number of tokens measured; None: all. They are read in pieces of `eval.piece`, with carried state.

        Raises:
            ConfigError: the text has no tokens, or cannot be encoded.
        """
        check_texts([text])
        ids = self.tokenizer.encode(text)[:context].astype(np.int64)
        if not len(ids):
            raise ConfigError("a text without tokens has no loss")
        losses = losses_by_position(
            *(self.module, [np.concatenate([[self.tokenizer.separator_id], ids])]),
            positions=len(ids),
            piece=self.cfg.eval.piece,
            device=self._run.world.device,
            should_stop=lambda: False,
        )
        assert losses is not None  # nothing could stop it
        return losses[0]

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        batch: int = 8,
        show: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """The text that follows a prompt, or each of several, without the prompt.

        Args:
            tokens: maximum number of new tokens; a text also ends where a document would, and at a stop string.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `ovq.inference.sampling.Sampling`;
                temperature 0 is greedy.
            stop: strings that end a text; they are not part of it.
            batch: maximum number of prompts continued together.
            show: called with each new bit of text as it becomes certain; only for a single prompt. For instance
                `functools.partial(print, end="", flush=True)`.

        Raises:
            ConfigError: an illegal value, an empty prompt, one too long for memory, or the run was trained on a
                generated task.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        found = generate(self._run, prompts, tokens=tokens, sampling=sampling, stop=stop, batch=batch, show=show)
        texts = [each.text for each in found]
        return texts[0] if isinstance(prompt, str) else texts


def load(
    path: str | Path,
    *,
    checkpoint: str | int | None = None,
    device: str = "auto",
    precision: str | None = None,
    weights: str | None = None,
    num_centroids: int | None = None,
    trust: Collection[str] = (),
) -> LoadedModel:
    """Open a trained model: its weights, its tokenizer and its config. Nothing in the folder is changed.

    Args:
        path: a run folder, one of its checkpoints, or an exported folder (`ovq.inference.export`).
        checkpoint: in a run folder, the checkpoint's folder, name or step; None: the newest good one.
        device: auto | cpu | cuda.
        precision: fp32 | bf16 | auto; None: that of the run.
        weights: trained, or ema: the moving average of the weights that a run with optim.ema keeps; None: those that
            the run evaluates (`eval.weights`).
        num_centroids: capacity of the dictionaries; None: the run's `eval.num_centroids` or, if that is null, the one
            used in training.
        trust: what the config may use: classes outside this project, whose code then runs, and oc.env:NAME.

    Raises:
        ConfigError: no such run, a class that is not trusted, an unusable device, or no dictionary to change.
        CheckpointError: there is no good checkpoint, or a damaged one was named.
    """
    path = Path(path)
    if checkpoint is None and not (path / "config.yaml").exists() and path.parent.name == "checkpoints":
        path, checkpoint = path.parent.parent, str(path)
    settings = [
        f"trainer.device={device}",
        *([f"eval.weights={weights}"] if weights else []),
        *([f"trainer.precision={precision}"] if precision else []),
    ]
    run = load_run(path, settings, checkpoint_at=checkpoint, trust=trust)
    if num_centroids is None:
        num_centroids = run.cfg.eval.num_centroids
    if num_centroids is not None:
        try:
            for mixer in with_dictionaries(run.model.mixers()):
                mixer.set_capacity(num_centroids)
        except ValueError as error:
            raise ConfigError(f"num_centroids={num_centroids}: {error}") from None
    return LoadedModel(run)
