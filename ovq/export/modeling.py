"""The model as transformers knows it: its config, its cache, and `AutoModelForCausalLM`'s class.

`import ovq.hf` registers these classes. An exported folder also has them, and the mixers of its model, in a single
file (`ovq.export.flatten`), so this module may import only what can go into that file.

Shapes: B batch, T new tokens, S tokens before them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ovq.mixers.base import detach_state
from ovq.model import Transformer


class OVQConfig(PreTrainedConfig):
    """The settings of a model, under the names that transformers' tools look for, and under ours (`attribute_map`).

    Args:
        pattern: the mixer of each layer, repeated to fill `num_hidden_layers`.
        mixers: name -> {"_target_": class path, and its settings}.
        training: a record of how the weights were made: step, tokens, the tokenizer's fingerprint, the run's settings.
    """

    model_type = "ovq"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 1024
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    pattern: list[str] | None = None
    mixers: dict[str, dict[str, Any]] | None = None
    training: dict[str, Any] | None = None


@dataclass
class Rows:
    """Rows of a batch whose first tokens are in the same column, and the state of every layer after the last token."""

    rows: list[int]
    state: list[Any] | None = None


class OVQCache(Cache):
    """What the layers carry from one call to the next: the mixers' states, of constant size if a mixer's state is.

    A state belongs to rows that start in the same column. The rows of a left-padded batch are therefore computed in
    groups of equal padding, each with its own state, which never sees a padding token.
    """

    is_compileable = False
    is_croppable = False  # a state cannot forget its last tokens
    is_sliding = [False]
    is_linear = [False]  # `generate` then drops the tokens already seen from the front of its input
    is_dummy = [False]
    is_initialized = True

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.groups: list[Rows] = []
        self.seen = 0

    def __repr__(self) -> str:
        return f"OVQCache({self.seen} tokens, {sum(len(group.rows) for group in self.groups)} rows)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen > 0

    def reset(self) -> None:
        self.groups, self.seen = [], 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a state cannot forget its last tokens; keep a copy.deepcopy of the cache instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = sum(len(group.rows) for group in self.groups)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace row i of the batch by the former row indices[i]; a row may be taken several times, or not at all."""
        wanted, groups = indices.tolist(), []
        for group in self.groups:
            at = {row: place for place, row in enumerate(group.rows)}
            if rows := [row for row, old in enumerate(wanted) if old in at]:
                places = torch.tensor([at[wanted[row]] for row in rows])
                groups.append(Rows(rows, select(group.state, places)))
        self.groups = groups


def select(state: Any, places: Tensor) -> Any:
    """The states of some rows. One-dimensional tensors hold positions, which all rows share."""
    return tree_map(
        lambda x: x.index_select(0, places.to(x.device)) if isinstance(x, Tensor) and x.dim() > 1 else x, state
    )


class OVQForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Its weights are those of `Transformer`, with the prefix "model."."""

    config_class = OVQConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # if config.tie_word_embeddings
    _no_split_modules = ["Block"]
    _is_stateful = True
    _supports_sdpa = True  # each layer chooses its kind of attention and its implementation

    def __init__(self, config: OVQConfig) -> None:
        super().__init__(config)
        settings: Any = config  # has the names of a ModelConfig, by `attribute_map`
        self.model = Transformer(settings, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the weights and buffers that no checkpoint provided, as before training."""
        held = list(self.state_dict(keep_vars=True).values())
        given = [(x, x.clone()) for x in held if getattr(x, "_is_hf_initialized", False)]
        if len(given) == len(held):
            return
        self.model.init_weights(torch.initial_seed())
        for x, value in given:
            x.copy_(value)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = OVQCache()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: OVQCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: OVQCache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next tokens, and the cache to continue from.

        Args:
            input_ids: int64 [B, T], which follow the S tokens that the cache has seen.
            attention_mask: [B, S + T], 0 at padding. Padding on the left is never computed. Padding on the right comes
                after every real token, so it is allowed if no cache is requested.
            cache, past_key_values: the same argument under its new and its old name. It is updated in place.
            labels: int64 [B, T], -100 where there is none; shifted internally. The loss is the mean, in nats.
            use_cache: return a cache; None: as the config says, but not in training.
            logits_to_keep: return logits of only this many last positions, or of these positions; 0: all.

        Raises:
            ValueError: embeddings instead of ids, a cache of another type or batch size, or a mask that has holes.
        """
        if kwargs.get("inputs_embeds") is not None or input_ids is None:
            raise ValueError("this model takes input_ids; inputs_embeds are not supported")
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("this model returns neither hidden states nor attentions")
        cache = cache if cache is not None else past_key_values
        if cache is not None and not isinstance(cache, OVQCache):
            raise ValueError(f"the cache must be an OVQCache, got {type(cache).__name__}")
        asked = use_cache or cache is not None
        wanted = asked or (use_cache is None and self.config.use_cache and not self.training)
        begins, whole = self._begins(input_ids, attention_mask, cache)
        if not whole:
            if asked:
                raise ValueError("attention_mask has a 0 after a row's first token; with a cache, pad on the left")
            wanted = False
        cache = (cache if cache is not None else OVQCache()) if wanted else None
        keep = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None
        logits, extra = self._logits(input_ids, begins, cache, keep)
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            names = ("num_items_in_batch", "ignore_index", "shift_labels")
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **given)
            loss = loss if extra is None else loss + extra / labels.numel()
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _begins(self, input_ids: Tensor, mask: Tensor | None, cache: OVQCache | None) -> tuple[list[int], bool]:
        """The column in which each row's tokens begin, counted from the first column seen, and whether no row is padded
        on the right."""
        seen = cache.seen if cache is not None else 0
        all_begun = seen > 0 and cache is not None and all(group.state is not None for group in cache.groups)
        B, T = input_ids.shape
        if mask is None or (T == 1 and all_begun):
            return [0] * B, True  # a mask on a GPU is read only where there may be padding
        if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, seen + T):
            raise ValueError(f"attention_mask must be [batch, tokens] = [{B}, {seen + T}], got {list(mask.shape)}")
        if mask.shape[1] == T:  # it covers the new tokens only
            mask = torch.cat([mask.new_ones(B, seen), mask], dim=1)
        counts = mask != 0
        begun = counts.cumsum(1) > 0
        ended = counts.flip(1).cumsum(1).flip(1) > 0
        begins, holes, rest = torch.stack(
            [(~begun).sum(1), (begun & ended & ~counts).sum(1), (begun & ~ended).sum(1)]
        ).tolist()
        if any(holes):
            raise ValueError("attention_mask has zeros between the tokens of a row")
        return begins, not any(rest)

    def _logits(
        self, input_ids: Tensor, begins: list[int], cache: OVQCache | None, keep: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T or keep, V], 0 at padding, and the weighted auxiliary loss, summed over tokens, or None."""
        (B, T), seen = input_ids.shape, cache.seen if cache is not None else 0
        groups = cache.groups if cache is not None and cache.groups else [Rows(list(range(B)))]
        if (rows := sum(len(group.rows) for group in groups)) != B:
            raise ValueError(f"the cache is of {rows} rows, but input_ids has {B}")
        # Rows that were nothing but padding so far may begin at different columns.
        waiting = [row for group in groups if group.state is None for row in group.rows]
        groups = [group for group in groups if group.state is not None] + grouped(waiting, begins)
        logits, extra = None, []
        for group in groups:
            first = max(0, begins[group.rows[0]] - seen) if group.state is None else 0
            if first >= T:
                continue  # nothing but padding so far
            alone = len(groups) == 1
            ids = (input_ids if alone else input_ids[group.rows])[:, first:]
            out = self.model(ids, state=group.state, return_state=cache is not None, logits_to_keep=keep)
            group.state = detach_state(out.state) if cache is not None else None
            extra += [] if out.aux_loss is None else [out.aux_loss]
            if alone and not first:
                logits = out.logits
                continue
            if logits is None:
                logits = out.logits.new_zeros(B, min(keep or T, T), out.logits.shape[-1])
            logits[group.rows, logits.shape[1] - out.logits.shape[1] :] = out.logits
        if cache is not None:
            cache.groups, cache.seen = groups, seen + T
        if logits is None:
            logits = self.model.head.weight.new_zeros(B, min(keep or T, T), self.config.vocab_size)
        return logits, torch.stack(extra).sum() if extra else None


def grouped(rows: Iterable[int], begins: list[int]) -> list[Rows]:
    """Group rows of a batch by the column of their first token, begins[row]."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(begins[row], []).append(row)
    return [Rows(found[begin]) for begin in sorted(found)]
