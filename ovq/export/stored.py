"""Reading an exported folder as data: its settings and weights. No code in it is imported, and nothing is unpickled.

The folder may also have been rewritten by transformers' `save_pretrained`, for instance after fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovq import config
from ovq.config import Config
from ovq.errors import ConfigError, one_line
from ovq.instantiate import refuse_untrusted

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The run's own tokenizer, by `tokenizer.kind`; transformers reads tokenizer.json, which may give other ids.
TOKENIZERS = {"sentencepiece": "tokenizer.model", "hf": "tokenizer_of_run.json"}
PREFIX = "model."  # of every weight's name: transformers' class has our model as its attribute `model`
# transformers' names of a model's settings, and ours.
NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
# The parts of a config that describe the run itself, and not where or for whom it ran.
TOLD = ("data", "tokenizer", "optim", "trainer", "eval", "name", "seed")


def is_export(path: Path | str) -> bool:
    """Whether a folder is a model in transformers' format."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.yaml").exists()


def to_settings(cfg: Config) -> dict[str, Any]:
    """A model's settings under transformers' names, with only the mixers it uses; `training.config` holds the run's."""
    values = config.to_dict(cfg)
    theirs = {ours: name for name, ours in NAMES.items()}
    model = {theirs.get(name, name): value for name, value in values["model"].items()}
    training = {name: values[name] for name in TOLD} | {"model": {name: model.pop(name) for name in ("name", "size")}}
    model["mixers"] = {
        name: settings | ({"backend": "auto"} if "backend" in settings else {})
        for name, settings in model["mixers"].items()
        if name in model["pattern"]
    }
    return {**model, "training": {"config": training}}


class Folder:
    """An exported folder.

    Raises:
        ConfigError: it holds a model of another type, or cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.values: dict[str, Any] = json.loads((self.path / CONFIG).read_bytes())
            kind = self.values.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{self.path / CONFIG} cannot be read ({one_line(error)})") from None
        if kind != "ovq":
            raise ConfigError(f"{self.path} is a model of type {kind}, and not one that ovq exported")
        self.training: dict[str, Any] = self.values.get("training") or {}

    @property
    def step(self) -> int:
        return int(self.training.get("step", 0))

    @property
    def tokens(self) -> int:
        return int(self.training.get("tokens", 0))

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer."""
        return self.training.get("tokenizer")

    @property
    def vocab_size(self) -> int:
        return int(self.values["vocab_size"])

    def config(self, trust: Collection[str] = ()) -> Config:
        """The config of the run that trained the model, with the tokenizer of this folder.

        Raises:
            ConfigError: it has an illegal setting, or names a class outside this project that is not trusted.
        """
        told = dict(self.training.get("config") or {})
        known = {NAMES.get(name, name): value for name, value in self.values.items()}
        fields = config.ModelConfig.__dataclass_fields__
        told["model"] = {**{name: known[name] for name in fields if name in known}, **told.get("model", {})}
        tokenizer = dict(told.get("tokenizer") or {})
        if name := TOKENIZERS.get(str(tokenizer.get("kind"))):
            tokenizer["model_path"] = str(self.path / name)
        told["tokenizer"] = tokenizer
        trainer = dict(told.get("trainer") or {})
        if isinstance(lengths := trainer.get("lengths"), dict):  # JSON has made text of its keys
            trainer["lengths"] = {int(at) if at.isdecimal() else at: length for at, length in lengths.items()}
        told["trainer"] = trainer
        try:
            cfg = config.from_dict(told, stored=True, trust=trust)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG} cannot be used: {one_line(error)}") from None
        refuse_untrusted(config.targets(cfg), trust, self.path, self.path / CONFIG)
        return cfg

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by its name in `Transformer`."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            with opened(file) as part:
                found |= {ours(name): tuple(part.get_slice(name).get_shape()) for name in list(part.keys())}
        return self._tied(found)

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights with these names, on the CPU."""
        found: dict[str, Tensor] = {}
        for file in self._files():
            with opened(file) as part:
                found |= {ours(name): part.get_tensor(name) for name in list(part.keys())}
        found = self._tied(found)
        return {name: found[name] for name in names}

    def _tied(self, found: dict[str, Any]) -> dict[str, Any]:
        if self.values.get("tie_word_embeddings") and "embed.weight" in found:
            found.setdefault("head.weight", found["embed.weight"])  # stored once
        return found

    def _files(self) -> list[Path]:
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        try:
            names = sorted(set(json.loads((self.path / INDEX).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{self.path} has no weights: neither {WEIGHTS} nor a good {INDEX}") from None
        return [self.path / Path(name).name for name in names]


def ours(name: str) -> str:
    return name.removeprefix(PREFIX)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a file of weights.

    Raises:
        ConfigError: safetensors is not installed, or the file is missing or damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ConfigError("an exported folder needs safetensors; install it with: pip install -e '.[export]'") from None
    try:
        with safe_open(file, framework="pt") as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({one_line(error)})") from None


def load_into(model: torch.nn.Module, folder: Folder) -> None:
    """Load all weights of a folder into a model, sharded or not.

    Raises:
        ConfigError: the weights are not those of this model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    own: dict[str, Any] = get_model_state_dict(model)
    stored = folder.shapes()
    wrong = [name for name, value in own.items() if stored.get(name) != tuple(value.shape)]
    if wrong or (unknown := [name for name in stored if name not in own]):
        named = wrong[0] if wrong else unknown[0]
        raise ConfigError(f"the weights of {folder.path} do not fit its {CONFIG}: {named}")
    weights: dict[str, Any] = {name: value.to(own[name].dtype) for name, value in folder.weights(own).items()}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
