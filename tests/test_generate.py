"""Claims about using a trained model: what is generated is what its logits say, whatever the batch and the pieces."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ovq
from data.tokenizer import ByteTokenizer
from ovq.errors import ConfigError
from ovq.inference import generate
from ovq.inference.generate import Growing, Sampling, continue_prompts
from ovq.model import Transformer
from tests.helpers import small_model
from tests.test_per_position import run_folder

PROMPTS = ["a", "some longer prompt", "three", "x" * 70]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Its weights are large, so that its logits differ enough to tell one token from another."""
    return small_model("sw_ovq", "model.init_std=0.3", vocab_size=257, seed=3).double().eval()


@torch.no_grad()
def by_hand(model: Transformer, prompt: Sequence[int], count: int, choose: Any) -> list[int]:
    """A whole pass for each token, without a state."""
    ids = list(prompt)
    for step in range(count):
        ids.append(choose(model(torch.tensor([ids])).logits[0, -1], step))
    return ids[len(prompt) :]


@pytest.mark.parametrize("piece", [7, 4096])
@pytest.mark.parametrize("name", ["sw_ovq", "sw_nope", "sw_gdn"])
def test_prompts_of_any_lengths_are_continued_as_if_alone(name: str, piece: int) -> None:
    model = small_model(name, "model.init_std=0.3", vocab_size=257, seed=3).double().eval()
    prompts = [[256, *text.encode()] for text in PROMPTS]
    new: list[list[int]] = [[] for _ in prompts]
    lengths = [5, 40, 1, 9]

    def take(row: int, token: int) -> bool:
        new[row].append(token)
        return len(new[row]) == lengths[row]

    def choose(logits_BV: torch.Tensor, at: int) -> list[int]:
        return logits_BV.argmax(-1).tolist()

    continue_prompts(model, prompts, choose=choose, take=take, device=torch.device("cpu"), piece=piece)
    assert new == [by_hand(model, p, n, lambda x, _: int(x.argmax())) for p, n in zip(prompts, lengths)]


def test_draws_follow_the_probabilities_that_the_settings_leave() -> None:
    p = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2])
    logits = p.log()

    def share(**settings: Any) -> np.ndarray:
        sampling = Sampling(**settings)
        return np.bincount(
            [sampling.choose(logits, row, step) for row in range(40) for step in range(100)], minlength=5
        )

    def near(counts: np.ndarray, want: Sequence[float]) -> None:
        assert counts.sum() == 4000
        expected = np.array(want) / sum(want)
        assert (counts[expected == 0] == 0).all()
        # Five standard errors of a share.
        assert (abs(counts / 4000 - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()

    near(share(), [0.4, 0.05, 0.3, 0.05, 0.2])
    near(share(top_k=2), [0.4, 0, 0.3, 0, 0])
    near(share(top_p=0.75), [0.4, 0, 0.3, 0, 0.2])
    near(share(top_p=0.4), [1, 0, 0, 0, 0])
    near(share(min_p=0.49), [0.4, 0, 0.3, 0, 0.2])
    near(share(min_p=0.51), [0.4, 0, 0.3, 0, 0])
    near(share(temperature=0.5), [0.16, 0.0025, 0.09, 0.0025, 0.04])
    assert share(temperature=0)[0] == 4000
    assert (share(seed=1) != share(seed=2)).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5 must be in 0 to 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


def grown(text: str | bytes, stop: Sequence[str] = ()) -> tuple[list[str], Growing]:
    """What becomes certain with each byte of a text, and at its end."""
    growing = Growing(ByteTokenizer(), stop)
    shown = []
    for byte in text.encode() if isinstance(text, str) else text:
        shown.append(growing.add(byte))
        if growing.stopped:
            return shown, growing
    return [*shown, growing.end()], growing


def test_a_character_is_shown_once_it_is_whole() -> None:
    shown, growing = grown("aé🧪b")
    assert shown == ["a", "", "é", "", "", "", "🧪", "b", ""] and growing.text == "aé🧪b"
    shown, growing = grown(b"a\xf0\x9f")
    assert shown == ["a", "", "", "\ufffd"] and growing.text == "a\ufffd", "cut off at the end"
    shown, growing = grown(b"\xffab")
    assert growing.text == "\ufffdab", "bytes that are no character do not hold the rest back for ever"


def test_a_stop_string_is_never_shown_not_even_in_part() -> None:
    shown, growing = grown("one\n\ntwo", ["\n\n"])
    assert shown == ["o", "n", "e", "", ""] and growing.stopped and growing.text == "one"
    shown, growing = grown("one\ntwo", ["\n\n"])
    assert "".join(shown) == growing.text == "one\ntwo" and not growing.stopped
    shown, growing = grown("abcabd", ["abd"])
    assert growing.text == "abc" and "".join(shown) == "abc"
    shown, growing = grown("ab", ["abc"])
    assert shown == ["", "", "ab"], "what only began like a stop string comes at the end"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("run"), "sw_ovq", [])


def test_a_loaded_model_gives_losses_and_texts(trained: Path) -> None:
    model = ovq.load(trained)
    text = "It was the best of times, it was the worst of times.\n" * 3
    losses = model.loss_by_position(text)
    ids = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        want = model.module(ids[:, :-1], targets_BT=ids[:, 1:], reduction="none").loss[0]
    assert losses.shape == (len(text.encode()),)
    np.testing.assert_allclose(losses, want.numpy(), rtol=1e-4, atol=1e-4)
    assert model.loss(text) == pytest.approx(losses.mean())
    np.testing.assert_allclose(model.loss_by_position(text, context=20), losses[:20], rtol=1e-5)
    with pytest.raises(ConfigError, match="a text without tokens has no loss"):
        model.loss("")

    together = model.generate(PROMPTS, tokens=12, seed=5)
    assert together == model.generate(PROMPTS, tokens=12, seed=5, batch=1), "whatever the batch"
    assert together != model.generate(PROMPTS, tokens=12, seed=6)
    shown: list[str] = []
    assert model.generate(PROMPTS[0], tokens=12, seed=5, show=shown.append) == together[0] == "".join(shown)
    assert model.generate(PROMPTS[0], tokens=0) == ""


def test_a_checkpoint_is_loaded_by_itself_and_with_another_dictionary(trained: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").glob("step_*")
    model = ovq.load(trained)
    other = ovq.load(checkpoint, num_centroids=3)
    assert model.step == other.step
    assert {mixer.capacity for mixer in other.module.mixers()} == {None, 3}
    text = "x" * 30 + "some text to read" * 30
    assert model.loss(text) != other.loss(text)
    with pytest.raises(ConfigError, match="num_centroids=0"):
        ovq.load(trained, num_centroids=0)
    with pytest.raises(ConfigError, match="is not a run folder"):
        ovq.load(trained / "no such folder")


def test_the_command_prints_the_prompt_and_its_continuation(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = [f"run={trained}", "tokens=8", "temperature=0"]
    want = ovq.load(trained).generate("a prompt", tokens=8, temperature=0.0)
    assert generate.main([*line, "prompt=a prompt"]) == 0
    assert capsys.readouterr().out == f"a prompt{want}\n"
    assert generate.main([*line, "prompt=[One,Two]"]) == 0
    assert capsys.readouterr().out.startswith("One")
    (tmp_path / "text.txt").write_text("a prompt")
    assert generate.main([*line, f"file={tmp_path}/text.txt"]) == 0
    assert capsys.readouterr().out == f"{want}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a prompt\n\n"))
    assert generate.main([*line, "interactive=true"]) == 0
    assert capsys.readouterr().out == f"a prompt{want}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of prompt=..., file=... and interactive=true"),
        (["prompt=a", "file=b"], "give one of prompt=..., file=... and interactive=true"),
        (["file=no/such/file"], "file=no/such/file cannot be read as text"),
        (["prompt=a", "num_centroids=0"], "num_centroids=0"),
        (["prompt=a", "top_p=2"], "top_p=2"),
    ],
)
def test_impossible_requests_are_one_line(
    trained: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([f"run={trained}", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
