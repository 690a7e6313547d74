"""Claims about using a trained model: it generates what its logits say, whatever the batch and piece size."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ovq
from data.contents import BOM
from data.tokenizer import ByteTokenizer
from ovq.cli import parse
from ovq.errors import ConfigError
from ovq.export.stored import Folder, to_settings
from ovq.inference import generate
from ovq.inference.generate import Growing, batches_of, continue_prompts
from ovq.inference.sampling import Sampling
from ovq.model import Transformer
from ovq.train.checkpoint import CheckpointError
from tests.helpers import MODELS, Largest, small_config, small_model
from tests.test_per_position import run_folder

PROMPTS = ["a", "some longer prompt", "three", "x" * 30]
# One model per mixer. Recurrences have a model of their own, and so are not also tested beside a sliding window.
ALONE = [name for name in MODELS if name.removeprefix("sw_") == name or name.removeprefix("sw_") not in MODELS]


@torch.no_grad()
def by_hand(model: Transformer, prompt: Sequence[int], count: int, choose: Any) -> list[int]:
    """Generate token by token with a full forward pass each, without a state."""
    ids = list(prompt)
    for step in range(count):
        ids.append(choose(model(torch.tensor([ids])).logits[0, -1], step))
    return ids[len(prompt) :]


def greedy(model: Transformer, prompts: Sequence[Sequence[int]], lengths: Sequence[int], piece: int) -> list[list[int]]:
    """Greedy continuations of prompts that are processed together, each of its own number of tokens."""
    new: list[list[int]] = [[] for _ in prompts]

    def take(row: int, token: int) -> bool:
        new[row].append(token)
        return len(new[row]) == lengths[row]

    def choose(logits_BV: torch.Tensor, at: int) -> list[int]:
        return logits_BV.argmax(-1).tolist()

    continue_prompts(model, prompts, choose=choose, take=take, device=torch.device("cpu"), piece=piece)
    return new


@pytest.mark.parametrize("name", ALONE)
def test_prompts_of_any_lengths_are_continued_as_if_alone_in_pieces_of_any_length(name: str) -> None:
    # Weights are large, so that the logits differ enough to tell one token from another.
    model = small_model(name, "model.init_std=0.3", vocab_size=257, seed=3).double().eval()
    prompts, lengths = [[256, *text.encode()] for text in PROMPTS], [4, 9, 1, 5]
    want = [by_hand(model, p, n, lambda x, _: int(x.argmax())) for p, n in zip(prompts, lengths)]
    assert greedy(model, prompts, lengths, piece=4096) == want
    assert [greedy(model, [p], [n], piece=7)[0] for p, n in zip(prompts, lengths)] == want


def test_a_long_prompt_takes_no_more_memory_than_a_short_one() -> None:
    """Compares the largest result of any operator, and the tensors alive when each token is chosen."""
    model = small_model("sw_ovq", vocab_size=257).eval()
    found = []
    for tokens in (64, 512):
        live: list[int] = []

        def choose(logits_BV: torch.Tensor, at: int, live: list[int] = live) -> list[int]:
            held = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # no FakeTensor
            live.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values()))
            return [7]

        prompt, left = [1 + index % 250 for index in range(tokens)], iter([False, False, True])
        with Largest() as largest:
            continue_prompts(
                *(model, [prompt]),
                choose=choose,
                take=lambda row, token, left=left: next(left),
                device=torch.device("cpu"),
                piece=32,
            )
        found.append((largest.elements, live))
    assert found[0] == found[1] and len(found[0][1]) == 3


def test_a_batch_reads_no_more_single_tokens_than_it_writes() -> None:
    lengths = [5, 900, 6, 5, 30, 1000, 21]
    assert list(batches_of(lengths, 8, 20)) == [[0, 3, 2, 6], [4], [1], [5]]
    assert list(batches_of(lengths, 2, 100)) == [[0, 3], [2, 6], [4], [1, 5]]


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
        # Within five standard errors of each fraction.
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


@pytest.mark.parametrize("temperature", [1e-310, 1e-300, 1e-9])
def test_a_temperature_however_small_is_that_of_the_largest_logit(temperature: float) -> None:
    assert Sampling(temperature=temperature).choose(torch.tensor([1.0, 30.0, 29.0, -5.0]), 0, 0) == 1


def test_a_penalty_lowers_the_logits_of_tokens_that_have_occurred() -> None:
    logits, seen = torch.tensor([3.0, 2.0, -1.0, -1.5]), torch.tensor([True, False, True, False])

    def order(penalty: float) -> list[int]:
        sampling, left, found = Sampling(temperature=0, repetition_penalty=penalty), logits.clone(), []
        for _ in range(4):
            found.append(sampling.choose(left, 0, 0, seen))
            left[found[-1]] = -torch.inf
        return found

    assert order(1.0) == [0, 1, 2, 3]
    assert order(2.0) == [1, 0, 3, 2], "3 -> 1.5 and -1 -> -2"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5 must be in 0 to 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40 must be in 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


def grown(text: str | bytes, stop: Sequence[str] = ()) -> tuple[list[str], Growing]:
    """(the text that becomes final with each byte and at the end, the `Growing` object)."""
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
    for text, stop in (("xxabéyy", "abé"), ("Hi. «Fin» more", "«Fin»"), ("a… b", "a…"), ("né🧪", "é🧪")):
        shown, growing = grown(text, [stop])
        assert growing.stopped and growing.text == "".join(shown) == text[: text.index(stop)], "bytes come one by one"
    shown, growing = grown("abèc", ["abé"])
    assert "".join(shown) == growing.text == "abèc" and not growing.stopped


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


def test_a_text_says_why_it_ends(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ovq.load(trained), [*b"one. two", 256]
    monkeypatch.setattr(Sampling, "choose", lambda self, logits_V, row, step, seen_V=None: ids[step])

    def end(tokens: int, *stop: str) -> tuple[str, int, str]:
        (found,) = generate.generate(model._run, ["a"], tokens=tokens, stop=stop)
        return found.text, found.tokens, found.finish

    assert end(5) == ("one. ", 5, "length")
    assert end(50, ". ") == ("one", 5, "stop")
    assert end(50) == ("one. two", 9, "end")


def test_a_penalty_is_for_the_tokens_of_the_prompt_and_of_the_text_so_far(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[tuple[int, int], set[int]] = {}

    def choose(self: Sampling, logits_V: torch.Tensor, row: int, step: int, seen_V: torch.Tensor) -> int:
        calls[row, step] = set(seen_V.nonzero()[:, 0].tolist())
        return 65 + step

    monkeypatch.setattr(Sampling, "choose", choose)
    assert ovq.load(trained).generate(["xy", "z" * 9], tokens=3, repetition_penalty=2.0) == ["ABC", "ABC"]
    assert [calls[0, step] for step in range(3)] == [{256, *b"xy"}, {256, *b"xyA"}, {256, *b"xyAB"}]
    assert calls[1, 2] == {256, *b"zAB"}


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


@pytest.mark.parametrize("option", ["num_centroids=3", "eval.num_centroids=3"])
def test_both_names_of_the_capacity_set_it(trained: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    used: list[set[int | None]] = []

    def made(run: Any, prompts: list[str], **_: Any) -> list[Any]:
        used.append({mixer.capacity for mixer in run.model.mixers()})
        return [generate.Continuation("", 0, "length") for _ in prompts]

    monkeypatch.setattr(generate, "generate", made)
    assert generate.main([f"run={trained}", "prompt=a", option]) == 0
    assert used == [{None, 3}]


def test_a_run_is_loaded_with_the_weights_that_it_evaluates(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path, "sw", ["optim.ema=0.9", "eval.weights=ema"])  # the checkpoint has no average
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        ovq.load(run_dir)
    assert ovq.load(run_dir, weights="trained").step == 3


def test_a_run_is_loaded_with_the_dictionary_that_it_evaluates(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path, "sw_ovq", ["eval.num_centroids=3"])
    assert {mixer.capacity for mixer in ovq.load(run_dir).module.mixers()} == {None, 3}


def test_an_exported_folder_has_one_set_of_weights(tmp_path: Path) -> None:
    cfg = small_config("sw", "data=builtin", "tokenizer=byte", "optim.ema=0.9")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ovq", "vocab_size": 257, **to_settings(cfg)}))
    with pytest.raises(ConfigError, match=r"eval.weights=ema: .* holds one set of weights \(eval.weights=trained\)"):
        ovq.load(tmp_path, weights="ema")


def test_the_config_of_an_exported_run_with_lengths_is_read_back(tmp_path: Path) -> None:
    cfg = small_config("sw", "data=builtin", "tokenizer=byte", "trainer.context=64", "trainer.lengths={0: 16, 3: 64}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ovq", "vocab_size": 257, **to_settings(cfg)}))
    folder = Folder(tmp_path)
    for _ in range(2):
        assert dict(folder.config().trainer.lengths) == {0: 16, 3: 64}


def test_the_command_prints_the_prompt_and_its_continuation(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = [f"run={trained}", "tokens=8", "temperature=0"]
    want = ovq.load(trained).generate("a prompt", tokens=8, temperature=0.0)
    assert generate.main([*line, "prompt=a prompt"]) == 0
    assert capsys.readouterr().out == f"a prompt{want}\n"
    (tmp_path / "text.txt").write_text("a prompt")
    assert generate.main([*line, f"file={tmp_path}/text.txt"]) == 0
    assert capsys.readouterr().out == f"{want}\n"
    document = "one\r\ntwo\r\n"
    (tmp_path / "text.txt").write_bytes(BOM + document.encode())
    assert generate.main([*line, f"file={tmp_path}/text.txt"]) == 0
    assert capsys.readouterr().out == ovq.load(trained).generate(document, tokens=8, temperature=0.0) + "\n"
    (tmp_path / "many.txt").write_bytes(BOM + b"a prompt\r\n\r\nTwo\r\n")
    assert generate.main([*line, f"prompts={tmp_path}/many.txt", "json=true"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows][0] == ("a prompt", want) and rows[1]["prompt"] == "Two"
    (tmp_path / "many.jsonl").write_text('{"prompt": "a prompt"}\n"Two"\n')
    assert generate.main([*line, f"prompts={tmp_path}/many.jsonl", "json=true"]) == 0
    made = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert made[0] == {"prompt": "a prompt", "text": want, "tokens": 8, "finish": "length"}
    assert made[1]["prompt"] == "Two" and len(made) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("a prompt\n\n"))
    assert generate.main([*line, "interactive=true"]) == 0
    assert capsys.readouterr().out == f"a prompt{want}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of prompt=..., file=..., prompts=... and interactive=true"),
        (["prompt=a", "file=b"], "give one of prompt=..., file=..., prompts=... and interactive=true"),
        (["file=no/such/file"], "file=no/such/file cannot be read as text"),
        (["prompts=/dev/null"], "prompts=/dev/null holds no prompt"),
        (["prompt="], "the prompt is empty"),
        (["prompt=a", "stop=['']"], "stop holds an empty string"),
        (["prompt=a", "num_centroids=0"], "num_centroids=0"),
        (["prompt=a", "top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
        (["prompt=a", "run=no/such/run"], "no/such/run"),
    ],
)
def test_impossible_requests_are_one_line(
    trained: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([f"run={trained}", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("\n", ["\n"]),
        (" It was a dark ", [" It was a dark "]),
        ("' a '", [" a "]),
        ('"Hello," she said, "yes"', ['"Hello," she said, "yes"']),
        ("[Intro] text", ["[Intro] text"]),
        ("[1] and [2]", ["[1] and [2]"]),
        ("[1, 2", ["[1, 2"]),
        ("[']', b]", ["]", "b"]),
        ("[One, 'Two, three',\"\n\"]", ["One", "Two, three", "\n"]),
    ],
)
def test_a_text_is_taken_as_it_is_typed(typed: str, prompts: list[str]) -> None:
    options = parse(generate.Options, ["run=a", f"prompt={typed}", f"stop={typed}"])
    assert options.prompt == prompts and options.stop == prompts


def test_prompts_are_lines_of_text_or_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\n\n Two, and\n")
    (tmp_path / "a.jsonl").write_text('"One"\n\n{"prompt": " Two, and", "other": 1}\n')
    for name in ("a.txt", "a.jsonl"):
        assert generate.prompts_of(generate.Options(prompts=str(tmp_path / name))) == ["One", " Two, and"]
    (tmp_path / "b.jsonl").write_text('"line\u2028of one prompt"\r\n"Two"\n', encoding="utf-8")
    assert generate.prompts_of(generate.Options(prompts=str(tmp_path / "b.jsonl"))) == [
        "line\u2028of one prompt",
        "Two",
    ]


def test_half_a_surrogate_pair_is_no_prompt_and_has_no_loss(trained: Path) -> None:
    with pytest.raises(ConfigError, match="this is not text: character 1 is half a surrogate pair"):
        ovq.load(trained).loss("\ud83d")
    with pytest.raises(ConfigError, match="this is not text: character 3 is half a surrogate pair"):
        generate.check_texts(["fine", "no\ud83d"])


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2 of prompts=.* is not JSON"), ('{"text": "a"}', "line 2 of prompts=.* must be a text or an object")],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "many.jsonl").write_text(f'"good"\n{line}\n')
    with pytest.raises(ConfigError, match=words):
        generate.prompts_of(generate.Options(prompts=str(tmp_path / "many.jsonl")))


def test_a_context_whose_state_exceeds_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ovq.load(run_folder(tmp_path, "std_att", []))
    assert model.generate("abc", tokens=3)
    monkeypatch.setattr(generate, "free_memory", lambda device: 10_000)
    with pytest.raises(ConfigError, match=r"the state of 1 x 1,004 tokens takes 0.00 GiB and 0.00 GiB are free"):
        model.generate("abc", tokens=1000)
