"""Export a trained model to a folder that transformers can open.

    python -m ovq.inference.export run=runs/cpu_demo out=exported
    python -m ovq.inference.export run=runs/a checkpoint=2000 out=exported license=apache-2.0 dtype=bf16

The folder holds the weights (safetensors), the settings, the tokenizer, a model card with what the run's files say, and
one source file with the layers of this model, so it can be opened with or without ovq:

    import ovq.hf                                                  # with: classes of this package, its GPU kernels
    model = AutoModelForCausalLM.from_pretrained("exported")

    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)    # without: plain PyTorch

`init_from=exported` starts a new run from it, and `ovq.load("exported")` opens it. Needs the extra `export`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from data.build import is_task
from data.builtin import BuiltinCorpus
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from ovq import processes
from ovq.cli import command
from ovq.errors import ConfigError
from ovq.export.card import card
from ovq.export.code import targets
from ovq.export.stored import TOKENIZERS, to_settings
from ovq.files import write_whole
from ovq.inference.run import Run, load_run
from ovq.schema import REQUIRED, one_of, setting

SAMPLE = 200_000  # characters of text on which the tokenizers are compared


@dataclass
class Options:
    run: str = setting(REQUIRED, "the run folder", paths=True)
    out: str = setting(REQUIRED, "folder to write, which must not exist or be empty", writes="folder")
    checkpoint: str | None = setting(None, "a checkpoint's folder, name or step; null: the newest good one", paths=True)
    dtype: str = one_of("fp32", "bf16", help="of the weights that are written")
    license: str | None = setting(None, "licence of the weights for the card, an identifier of the Hub")
    name: str | None = setting(None, "name of the model in the card; null: that of the run folder")


@command(Options)
def main(options: Options) -> int:
    """The command line in the module's docstring."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("export needs transformers; install it with: pip install -e '.[export]'")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} exists and is not empty; name another folder, or remove it")
    run = load_run(options.run, ["trainer.device=cpu", "trainer.precision=fp32"], checkpoint_at=options.checkpoint)
    if run.world.size > 1:
        raise ConfigError("an export is written by one process; run it without torchrun")
    export(run, out, dtype=options.dtype, licence=options.license, name=options.name)
    files = sorted(out.iterdir())
    print(f"{out}: step {run.step} of {run.run_dir}, {sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB")
    print("  " + ", ".join(file.name for file in files))
    processes.shutdown()
    return 0


def export(run: Run, out: Path, *, dtype: str = "fp32", licence: str | None = None, name: str | None = None) -> None:
    """Write an opened run as a folder for transformers. The folder appears complete or not at all.

    Raises:
        ConfigError: a mixer or tokenizer from outside this package.
    """
    from transformers.utils import logging

    import ovq.hf as hf

    logging.disable_progress_bar()
    targets(dict(run.cfg.model.mixers), list(run.cfg.model.pattern))
    separator = None if is_task(run.cfg) else run.tokenizer.separator_id
    ids = {name: separator for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = to_settings(run.cfg)
    values["training"] |= {
        "step": run.step,
        "tokens": run.tokens,
        "tokenizer": run.tokenizer.fingerprint,
    }
    settings: dict[str, Any] = {"vocab_size": run.tokenizer.vocab_size, **ids, **rope(values["mixers"]), **values}
    config = hf.OVQConfig(**settings)
    with torch.device("meta"):
        model = hf.OVQForCausalLM(config)
    weights = {f"model.{key}": value for key, value in run.model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config.update(**ids)
    if dtype == "bf16":
        model.bfloat16()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(scratch)
        note = write_tokenizer(run, scratch)
        text = card(
            *(run.cfg, run.model, run.run_dir),
            step=run.step,
            tokens=run.tokens,
            name=name or run.run_dir.resolve().name,
            licence=licence,
            tokenizer_note=note,
        )
        write_whole(scratch / "README.md", text)
        scratch.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rope(mixers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rotary embedding under the names that other tools look for; the layers read their own settings."""
    for settings in mixers.values():
        if (base := settings.get("rope_base")) and settings.get("position") != "none":
            scaling = settings.get("rope_scaling") or {"rope_type": "default"}
            return {"rope_theta": base, "rope_parameters": {"rope_theta": base, **scaling}}
    return {}


def write_tokenizer(run: Run, folder: Path) -> str:
    """Write the tokenizer's files; returns a line for the card on how they compare with the run's own."""
    own = run.tokenizer
    if is_task(run.cfg):
        return "symbols of a generated task; there is no tokenizer."
    from ovq.export.fast_tokenizer import byte_tokenizer, hf_tokenizer, sentencepiece_tokenizer

    note = "a text that spells the separator's name is taken for it"
    if isinstance(own, ByteTokenizer):
        fast, kind = byte_tokenizer(), "bytes"
    elif isinstance(own, SentencePieceTokenizer):
        model = own.model
        fast, kind = sentencepiece_tokenizer(model), "SentencePiece"
        write_whole(folder / TOKENIZERS["sentencepiece"], model)
        note += (
            "; so is U+2581 for a space, which the run's tokenizer writes as bytes; and unigram models may break a tie "
            "of score differently (`tokenizer.model` is the run's own)"
        )
    elif isinstance(own, HFTokenizer):
        fast, kind = hf_tokenizer(own.adapted(), own.separator, own.separator_id), "tokenizer.json"
        write_whole(folder / TOKENIZERS["hf"], own.model)
        note += f", as is one that spells another special token's; the file that the run used is `{TOKENIZERS['hf']}`"
    else:
        raise ConfigError(f"the tokenizer {type(own).__name__} cannot be exported; legal: byte, sentencepiece, hf")
    fast.save_pretrained(folder)
    different, total = compared(fast, own)
    return (
        f"{kind}, vocabulary of {own.vocab_size:,}. `tokenizer.json` gives the ids of the run's own tokenizer but for "
        f"{different:,} of {total:,} tokens of the text that comes with ovq; {note}."
    )


def compared(fast: Any, own: Tokenizer) -> tuple[int, int]:
    """(tokens that the exported tokenizer does not reproduce, all tokens) of the text that comes with this package."""
    text = BuiltinCorpus("validation").read(0).text[:SAMPLE]
    different = total = 0
    for paragraph in text.split("\n\n"):
        ids = own.encode(paragraph + "\n\n").tolist()
        theirs = fast(paragraph + "\n\n", add_special_tokens=False)["input_ids"]
        total += len(ids)
        if ids != theirs:
            blocks = SequenceMatcher(None, ids, theirs, autojunk=False).get_matching_blocks()
            different += len(ids) - sum(block.size for block in blocks)
    return different, total


if __name__ == "__main__":
    sys.exit(main())
