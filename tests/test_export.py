"""Claims about exported models: transformers gives our results with or without this package, and they load back."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ovq
import train
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from data.train_tokenizer import train_sentencepiece
from ovq.errors import ConfigError
from ovq.export import flatten, source
from tests.helpers import MIXERS, small_config, small_model
from tests.test_per_position import run_folder
from tests.test_tokenizer import SPECIAL, byte_level, hf, llama, prose, unigram
from tests.test_warm_start import RUN

pytest.importorskip("transformers")

from ovq.export.code import write_code  # noqa: E402
from ovq.export.fast_tokenizer import byte_tokenizer, hf_tokenizer, sentencepiece_tokenizer  # noqa: E402
from ovq.export.stored import Folder, to_settings  # noqa: E402
from ovq.inference.export import main  # noqa: E402

TEXTS = ["data=builtin", "tokenizer=byte"]
PROMPTS = ["It was a dark", "Once", "and a much longer prompt, read in pieces"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run with large weights, so that its logits clearly differ between tokens."""
    return run_folder(tmp_path_factory.mktemp("run"), "sw_ovq", TEXTS, "model.init_std=0.3", steps=(2, 3))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    assert main([f"run={run}", f"out={out}", "license=mit"]) == 0
    return out


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flat_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat_model(model: str, folder: Path, *overrides: str) -> tuple[Any, Any]:
    """(one of our models in float64, the same model built from an export's modelling file)."""
    cfg, own = small_config(model, *overrides), small_model(model, "model.init_std=0.3", *overrides).double().eval()
    from ovq.hf import OVQConfig

    config = OVQConfig(vocab_size=own.vocab_size, **to_settings(cfg))
    module = imported(write_code(config, folder))
    flat = module.OVQForCausalLM(module.OVQConfig(**config.to_dict())).double().eval()
    flat.model.load_state_dict(own.state_dict())
    return own, flat


# --- the modelling file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_one_file_computes_what_the_package_does_with_any_mixer(mixer: str, tmp_path: Path) -> None:
    """In one pass, in pieces of any length with the cache, and with left padding, which must not affect any state."""
    alone = mixer == "sliding_window"
    pair = [] if alone else [f"+model/mixer@model.mixers.{mixer}={mixer}", f"model.pattern=[{mixer},sliding_window]"]
    own, flat = flat_model("sw", tmp_path, *pair)
    tokens = torch.randint(own.vocab_size, (3, 45), generator=torch.Generator().manual_seed(0))
    whole = own(tokens).logits
    assert torch.equal(flat(tokens).logits, whole)
    assert torch.equal(flat(tokens, logits_to_keep=2).logits, whole[:, -2:])
    begins = torch.tensor([0, 9, 9])
    mask = (torch.arange(45) >= begins[:, None]).long()
    tokens[mask == 0] = 60
    rows = [own(row[begin:][None]).logits[0] for row, begin in zip(tokens, begins.tolist())]
    for piece in (1, 7, 128):
        cache, logits = None, []
        for start in range(0, 45, piece):
            part = slice(start, start + piece)
            name = "cache" if piece == 7 else "past_key_values"
            out = flat(tokens[:, part], attention_mask=mask[:, : start + piece], use_cache=True, **{name: cache})
            cache = out.cache
            logits.append(out.logits)
        for row, begin, expected in zip(torch.cat(logits, dim=1), begins.tolist(), rows):
            torch.testing.assert_close(row[begin:], expected, rtol=0, atol=1e-9)
        assert cache is not None and cache.get_seq_length() == 45
    exact = flat(tokens[:, :20]).logits[:, 19:]
    flat.bfloat16()
    near = flat(tokens[:, 19:20], cache=flat(tokens[:, :19], use_cache=True).cache).logits
    assert near.dtype == torch.bfloat16 and (near - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_the_file_holds_the_mixers_of_its_model_and_needs_torch_and_transformers_only(exported: Path) -> None:
    from transformers.dynamic_module_utils import get_imports

    text = (exported / "modeling_ovq.py").read_text()
    assert "class OVQ(" in text and "class SlidingWindow(" in text
    for other in (
        "class GatedDeltaNet",
        "class VQ(",
        "import triton",
        "flex_attention",
        "import fla",
        "from ovq",
        "import ovq",
    ):
        assert other not in text
    assert set(get_imports(exported / "modeling_ovq.py")) - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_what_cannot_be_put_into_one_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ovq"
    package.mkdir()
    (package / "low.py").write_text("import math\n\ndef forward(x):\n    return math.sin(x)\n")
    (package / "high.py").write_text(
        "from ovq import low\nfrom ovq.low import forward as below\n\n\n"
        "def forward(x, math=1):\n    forward = low.forward\n    return forward(x) + below(x) + math\n"
    )
    monkeypatch.setattr(source, "ROOT", tmp_path)
    names: dict[str, Any] = {}
    exec(flatten.flatten([("ovq.high", "forward")], ""), names)  # names that are used twice are kept distinct
    assert names["forward"](0.5) == 1 + 2 * __import__("math").sin(0.5)
    (package / "high.py").write_text("from ovq import low\n\n\ndef forward(x):\n    return [low]\n")
    with pytest.raises(flatten.FlattenError, match="high.py:5: the module low is used as a value"):
        flatten.flatten([("ovq.high", "forward")], "")


# --- transformers ----------------------------------------------------------------------------------------------------

WITHOUT = """
import importlib.util, sys, torch
assert importlib.util.find_spec("ovq") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=12, do_sample=False, prefill_chunk_size=7)
model.save_pretrained(tokens + "_again")
with torch.no_grad():
    torch.save({"logits": model(torch.load(tokens)).logits, "made": made[:, inputs.input_ids.shape[1] :]}, tokens)
"""


def greedy(run: Path) -> list[list[int]]:
    """Our own model's greedy continuation of each prompt: 12 token ids."""
    model, texts = ovq.load(run, precision="fp32"), []
    for prompt in PROMPTS:
        ids = [model.tokenizer.separator_id, *prompt.encode()]
        for _ in range(12):
            ended = len(ids) > len(prompt) + 1 and ids[-1] == model.tokenizer.separator_id
            ids.append(ids[-1] if ended else int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(ids[-12:])
    return texts


@torch.no_grad()
def test_an_environment_without_this_package_gets_the_same_bits_and_texts(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(250, (2, 300), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens")
    # -S ignores .pth files, through which this package is installed.
    command = [sys.executable, "-S", "-c", f"PROMPTS = {PROMPTS}{WITHOUT}", str(exported), str(tmp_path / "tokens")]
    paths = {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | paths, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "tokens")
    assert torch.equal(theirs["logits"], ovq.load(run, precision="fp32").module(tokens).logits)
    assert theirs["made"].tolist() == greedy(run)
    # What its save_pretrained wrote is an export too.
    assert (tmp_path / "tokens_again" / "modeling_ovq.py").is_file()
    again = ovq.load(tmp_path / "tokens_again", precision="fp32")
    assert torch.equal(again.module(tokens).logits, theirs["logits"])


@pytest.fixture(scope="module")
def registered(exported: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the export, loaded with this package's classes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ovq.hf

    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is ovq.hf.OVQForCausalLM
    return model, AutoTokenizer.from_pretrained(exported)


@torch.no_grad()
def test_generate_gives_our_texts_however_it_is_batched_and_searched(run: Path, registered: tuple[Any, Any]) -> None:
    model, tokenizer = registered
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    width = inputs.input_ids.shape[1]
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert made[:, width:].tolist() == greedy(run)
    # A second call continues from the cache of the first.
    first = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    cache = first.cache
    mask = torch.cat([inputs.attention_mask, inputs.attention_mask.new_ones(3, 6)], dim=1)
    more = model.generate(first.sequences, attention_mask=mask, cache=cache, max_new_tokens=6, do_sample=False)
    going = [row for row in range(3) if model.config.eos_token_id not in made[row, width : width + 6].tolist()]
    assert len(going) > 1 and torch.equal(more[going], made[going])  # the other rows had already ended
    beams = [
        model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
def test_half_precision_stays_near_and_losses_and_gradients_are_those_of_training(
    exported: Path, registered: tuple[Any, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = registered
    tokens = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))
    half = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact, near = model(tokens).logits, half(tokens).logits
    assert near.dtype == torch.bfloat16 and (near - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert half.generate(tokens, max_new_tokens=3).shape == (2, 43)
    with torch.enable_grad():
        loss = model(tokens, labels=tokens).loss
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(loss, model.model(tokens, targets_BT=targets).loss / (2 * 39))
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_a_new_model_is_initialised_as_ours_and_tied_weights_stay_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import ovq.hf

    cfg = small_config("sw_mamba2", "model.tie_embeddings=true")
    config = ovq.hf.OVQConfig(vocab_size=61, **to_settings(cfg))
    torch.manual_seed(5)
    model = ovq.hf.OVQForCausalLM(config)
    expected = small_model("sw_mamba2", "model.tie_embeddings=true", seed=5).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.head.weight is again.model.embed.weight
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    assert Folder(tmp_path).shapes().keys() == expected.keys()


def test_a_mask_that_would_touch_a_state_is_refused(registered: tuple[Any, Any]) -> None:
    model, _ = registered
    tokens, mask = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[1, 1, 0, 0]])
    assert model(tokens, attention_mask=mask).cache is None, "padding after all that counts changes no logits"
    with pytest.raises(ValueError, match="pad on the left"):
        model(tokens, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="zeros between"):
        model(tokens, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32), input_ids=None)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tokenizer") / "some.model"
    train_sentencepiece(iter(prose(4000, 0).split("\n")), 400, path)
    return path.read_bytes()


HF = {"byte-level": (byte_level, "<|endoftext|>"), "byte fallback": (llama, "</s>"), "unigram": (unigram, "</s>")}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", *HF])
def test_the_exported_tokenizer_gives_our_ids(kind: str, sentencepiece_model: bytes, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    own: Any = ByteTokenizer() if kind == "byte" else SentencePieceTokenizer(sentencepiece_model)
    made = byte_tokenizer() if kind == "byte" else sentencepiece_tokenizer(sentencepiece_model)
    if kind in HF:
        own = hf(HF[kind][0](), HF[kind][1])
        made = hf_tokenizer(own.adapted(), own.separator, own.separator_id)
    made.save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [prose(300, 1), *SPECIAL, "", " ", "\n\n  \n", "  a  b ", "\u65e5\u672c \U0001f9ea", "<unk>a<0x0A>b<s>"]
    odd = {"<document>"} if kind == "byte" else {"<document>", "\u2581"}  # as the model card says
    if kind in HF:
        names = [token["content"] for token in HF[kind][0]()["added_tokens"]]
        odd = {text for text in texts if re.search("|".join([*map(re.escape, names), "<0x..>", "\u2581"]), text)}
        texts = [text for text in texts if text not in odd]
    for text in texts:
        ids = own.encode(text).tolist()
        assert fast.decode(ids) == own.decode(ids) == text
        if text not in odd:
            assert fast(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
            assert fast(text)["input_ids"] == [own.separator_id, *ids]
    assert fast.bos_token_id == fast.eos_token_id == fast.pad_token_id == own.separator_id
    assert fast.padding_side == "left" and len(fast) == own.vocab_size


def test_a_run_with_a_tokenizer_json_is_exported_and_read_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    texts = ["data=builtin", "tokenizer=hf", f"tokenizer.model_path={tmp_path}/tokenizer.json"]
    run = run_folder(tmp_path, "sw", [*texts, "tokenizer.separator=<|endoftext|>"])
    assert main([f"run={run}", f"out={tmp_path}/exported"]) == 0
    (tmp_path / "tokenizer.json").unlink()
    own, back = ovq.load(run), ovq.load(tmp_path / "exported")
    assert back.tokenizer.fingerprint == own.tokenizer.fingerprint
    ids = AutoTokenizer.from_pretrained(tmp_path / "exported")("Once more.")["input_ids"]
    assert ids == [own.tokenizer.separator_id, *own.tokenizer.encode("Once more.").tolist()]
    assert "tokenizer_of_run.json" in (tmp_path / "exported" / "README.md").read_text()


# --- loading an export -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_folder_is_loaded_and_trained_further(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, back = ovq.load(run), ovq.load(exported)
    for name, value in own.module.state_dict().items():
        assert torch.equal(value, back.module.state_dict()[name])
    assert back.step == own.step == 3 and back.cfg.trainer.context == own.cfg.trainer.context
    assert back.generate("Once", tokens=5, temperature=0) == own.generate("Once", tokens=5, temperature=0)
    settings = ["model.mixers.ovq.chunk_size=8", "model.mixers.ovq.num_centroids=12", "model=sw_ovq"]
    line = [*RUN, *settings, "trainer.steps=1", "optim.lr=0", f"init_from={exported}", f"run_dir={tmp_path}/next"]
    with torch.enable_grad():
        assert train.main(line) == 0
    after = ovq.load(tmp_path / "next").module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in own.module.state_dict().items())
    assert f"weights of {exported}" in capsys.readouterr().err


def test_the_card_says_what_was_measured_and_the_licence(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n") and "Tokens learned from: 72 (3 steps" in text
    assert "Loss by position was not measured" in text and "`builtin`" in text and "tokens differ" not in text
    assert "gives the ids of the run's own tokenizer but for 0 of" in text


def test_a_table_of_losses_is_in_the_card_shortened_by_weight(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ovq.export.card import LOSSES, losses

    row = {"step": 3, "context": 64, "split": "test", "buckets": "log", "num_centroids": None, "stderr": 0.5}
    row["changes"] = ""
    places = [{"position_start": n, "position_end": n + 1, "loss": float(n), "tokens": 1 + n % 2} for n in range(22)]
    other = {**row, **places[0], "step": 2, "loss": 99.0}
    pq.write_table(pa.Table.from_pylist([other, *({**row, **place} for place in places)]), tmp_path / LOSSES)
    lines = losses(tmp_path, 3, None)
    assert "| 0 to 1 | 0.6667 |  | 3 |" in lines and len([line for line in lines if line.startswith("| ")]) == 2 + 11
    assert not [line for line in lines if "99" in line]
    assert (
        losses(tmp_path, 7, None) == losses(tmp_path, 3, 9) == ["", "Loss by position was not measured at this step."]
    )


def test_what_cannot_be_exported_or_read_back_is_one_line(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(line: list[str], *words: str) -> None:
        status = main(line) if line[0].startswith("run=") else train.main(line)
        said = capsys.readouterr().err
        assert status in (1, 2) and said.count("\n") == 1 and all(word in said for word in words), said

    refused([f"run={run}", f"out={exported}"], "exists and is not empty")
    empty = run_folder(tmp_path, "sw", TEXTS, steps=())
    refused([f"run={empty}", f"out={tmp_path}/x"], "holds no good checkpoint")
    line = [*RUN, "model=sw_ovq", "trainer.steps=1", f"run_dir={tmp_path}/next"]
    values = json.loads((exported / "config.json").read_text())

    def changed(**settings: Any) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values | settings))
        (folder / "modeling_ovq.py").write_text("raise SystemExit('the code of a folder was run')")
        return folder

    refused([*line, f"init_from={changed()}"], "has no weights")
    refused([*line, f"init_from={changed(model_type='llama')}"], "a model of type llama")
    refused([*line, f"init_from={changed(training={'tokenizer': 'byte:2'})}"], "trained with another tokenizer")
    mixers = values["mixers"] | {"ovq": {"_target_": "stranger.Trap"}}
    with pytest.raises(ConfigError, match="stranger.Trap, which is not part of this project"):
        ovq.load(changed(mixers=mixers))
    (changed() / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="model.safetensors cannot be read"):
        ovq.load(tmp_path / "changed")


def test_a_mixer_from_outside_is_named_before_anything_is_written(tmp_path: Path) -> None:
    from ovq.hf import OVQConfig

    config = OVQConfig(mixers={"mine": {"_target_": "leaky.Leaky"}}, pattern=["mine"])
    with pytest.raises(ConfigError, match=r"leaky\.Leaky is not part of ovq"):
        write_code(config, tmp_path)
    assert not list(tmp_path.iterdir())
