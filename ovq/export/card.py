"""The model card (README.md) of an exported folder: what the run's files say, and nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ovq.config import Config
from ovq.model import Transformer, count_parameters, state_bytes

LOSSES = "per_position_loss.parquet"  # in a run folder
ROWS = 20  # maximum number of rows in the table of losses


def card(
    cfg: Config,
    model: Transformer,
    run_dir: Path,
    *,
    step: int,
    tokens: int,
    name: str,
    licence: str | None,
    tokenizer_note: str,
) -> str:
    """The text of the card.

    Args:
        tokens: with a label, read in training.
        licence: licence of the weights, as an identifier of the Hub; None: the card says that none was given.
        tokenizer_note: how the exported tokenizer compares with the run's.
    """
    total, body = count_parameters(model)
    trainer, data = cfg.trainer, cfg.data
    sizes = [f"{state_bytes(model, length) / 2**20:,.4g} MiB after {length:,} tokens" for length in (2048, 65536)]
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [ovq, long-context]"]
    front.insert(0, f"license: {licence or 'unknown'}")
    return "\n".join(
        [
            *("---", *front, "---", "", f"# {name}", ""),
            f'A language model of {total:,} parameters ({body:,} without embeddings), trained with ovq ("Online Vector '
            "Quantized Attention\", arXiv 2602.03922). Each line below is from the run's own files.",
            *("", "## Use", "", "```python"),
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "# With ovq installed, `import ovq.hf` instead of trust_remote_code: then no code of this folder runs.",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
            *(
                []
                if data.kind == "task"
                else [
                    'tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)',
                    'inputs = tokenizer(["It was a dark", "Once"], padding=True, return_tensors="pt")',
                    "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50)))",
                ]
            ),
            *("```", ""),
            "Needs transformers 5.24 or newer. A batch whose prompts have different lengths is padded on the left, and "
            "computed in groups of equal length. With a cache, a long prompt may be read in pieces "
            "(`generate(..., prefill_chunk_size=2048)`).",
            *("", "## Model", ""),
            f"- Layers: {cfg.model.num_layers}, in the pattern {', '.join(cfg.model.pattern)}; width {cfg.model.dim}, "
            f"{cfg.model.num_heads} heads of {cfg.model.head_dim}, {cfg.model.num_kv_heads} key/value heads.",
            *(f"- `{mixer}`: {settings(cfg, mixer)}" for mixer in dict.fromkeys(cfg.model.pattern)),
            f"- State of one sequence (bf16 activations): {', '.join(sizes)}.",
            f"- Tokens: {tokenizer_note}",
            *("", "## Training", ""),
            f"- Tokens learned from: {tokens:,} ({step:,} steps of {trainer.global_batch} sequences of "
            f"{trainer.context:,} tokens).",
            f"- Data: {described(cfg)}.",
            f"- Optimizer: {cfg.optim.name}, peak learning rate {cfg.optim.lr:g}, schedule {cfg.optim.schedule}; "
            f"seed {cfg.seed}.",
            *(["- These weights are the moving average of the trained ones."] if cfg.eval.weights == "ema" else []),
            *([f"- Weights at the start: those of {cfg.init_from.path}."] if cfg.init_from.path else []),
            *losses(run_dir, step, cfg.eval.num_centroids),
            *("", "## Licence", ""),
            f"- Weights: {licence or 'none was stated by whoever exported them'}.",
            "- Training data: see its own licence; the exporter knows only its name.",
            "- Code (`modeling_ovq.py`): Apache-2.0.",
            "",
        ]
    )


def settings(cfg: Config, mixer: str) -> str:
    given = {key: value for key, value in dict(cfg.model.mixers[mixer]).items() if key not in ("_target_", "backend")}
    return ", ".join(f"{key} {value}" for key, value in given.items()) or "no settings"


def described(cfg: Config) -> str:
    """The training data in words."""
    data = cfg.data
    if data.kind == "task":
        return f"generated, {data.task['_target_'].rpartition('.')[2]} {json.dumps(plain_task(cfg))}"
    files = [Path(name).name if "://" not in name else name for name in data.train]
    shown = f": {', '.join(files[:4])}{' ...' if len(files) > 4 else ''}" if files else ""
    return f"`{data.name}` ({data.kind}{shown})"


def plain_task(cfg: Config) -> dict[str, Any]:
    return {key: value for key, value in dict(cfg.data.task).items() if key != "_target_"}


def losses(run_dir: Path, step: int, capacity: int | None) -> list[str]:
    """Lines with a table of loss by position as measured at this step, or a line that says that it was not.

    Args:
        capacity: the run's `eval.num_centroids`.
    """
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(run_dir / LOSSES).to_pylist()
    except Exception:  # missing or damaged: the card then has no table
        return ["", "Loss by position was not measured at this step."]
    plain = [row for row in rows if row["num_centroids"] == capacity and not row["changes"]]
    own = [row for row in plain if row["step"] == step and row["buckets"] == "log"]
    if not own:
        return ["", "Loss by position was not measured at this step."]
    key = ("context", "split")
    longest = max(own, key=lambda row: row["context"])
    chosen = [row for row in own if all(row[name] == longest[name] for name in key)]
    while len(chosen) > ROWS:  # halve the resolution, weighting buckets by their tokens
        chosen = [merged(chosen[at : at + 2]) for at in range(0, len(chosen), 2)]
    with_n = f", with dictionaries of N = {capacity:,}" if capacity else ""
    lines = [
        "",
        f"Loss on held-out documents ({longest['split']}), by position in a context of {longest['context']:,}{with_n}:",
        *("", "| positions | nats per token | standard error | tokens |", "| --- | --- | --- | --- |"),
    ]
    for row in chosen:
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        place = f"{row['position_start']:,} to {row['position_end'] - 1:,}"
        lines.append(f"| {place} | {row['loss']:.4f} | {error} | {row['tokens']:,} |")
    return lines


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Neighbouring buckets merged into one, whose standard error is unknown."""
    if len(rows) == 1:
        return rows[0]
    first, last = rows
    tokens = first["tokens"] + last["tokens"]
    loss = (first["loss"] * first["tokens"] + last["loss"] * last["tokens"]) / tokens
    return {**first, "position_end": last["position_end"], "loss": loss, "stderr": None, "tokens": tokens}
