"""Claims about lm-evaluation-harness: scores equal those of the logits token by token, and are saved."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from data.train_tokenizer import train_sentencepiece
from eval import harness
from ovq.model import ModelOutput, Transformer
from tests.helpers import small_model
from tests.test_per_position import run_folder


class Request(NamedTuple):
    """The part of the harness's own class that the adapter reads."""

    args: tuple[Any, ...]


REPO = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TRAINED_AT = 24  # tokens; far shorter than the texts below


def text_of(length: int, seed: int) -> str:
    """Random text that ends in a letter. (In a text of one repeated letter, OVQ's keys tie exactly, and rounding breaks
    the ties.)"""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefghijklm  \n.") for _ in range(length - 1)) + "x"


def wrap(model: Any, tokenizer: Tokenizer | None = None, **settings: Any) -> Any:
    pytest.importorskip("lm_eval", exc_type=ImportError)
    from eval.harness_model import HarnessModel

    return HarnessModel(model, tokenizer or ByteTokenizer(), CPU, **settings)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A model with large weights, so that its logits differ enough to tell one token, or one position, from another."""
    return small_model("sw_ovq", "model.init_std=0.3", vocab_size=257, seed=3).double().eval()


@torch.no_grad()
def logits_after(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """Logits [V] of the next token after a sequence of ids, computed in one pass without a state."""
    return model(torch.tensor([list(ids)])).logits[0, -1]


def by_hand(model: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether it is greedy; computed with one pass per token."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        logits = logits_after(model, ids)
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


def greedy_by_hand(model: Transformer, context: Sequence[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(logits_after(model, ids).argmax()))
    return ids[len(context) :]


def check(got: list[tuple[float, bool]], want: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], rel=1e-5, abs=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


# --- log-likelihoods -------------------------------------------------------------------------------------------------

PAIRS = [(text_of(n, n), " " + text_of(m, n + m)) for n, m in [(5, 3), (61, 2), (17, 30), (140, 9), (16, 1), (33, 7)]]


def test_scores_are_those_of_the_logits_token_by_token(model: Transformer) -> None:
    lm = wrap(model)
    want = [by_hand(model, [256, *context.encode()], continuation.encode()) for context, continuation in PAIRS]
    check(lm.loglikelihood([Request(pair) for pair in PAIRS]), want)
    assert len({round(score / len(pair[1]), 3) for (score, _), pair in zip(want, PAIRS)}) == len(PAIRS)  # not uniform


def test_is_greedy_is_what_greedy_decoding_gives(model: Transformer) -> None:
    lm = wrap(model)
    context = [256, *b"a context"]
    right = greedy_by_hand(model, context, 6)
    cases = [right, right[:1], [*right[:5], (right[5] + 1) % 256], [(right[0] + 1) % 256, *right[1:]]]
    got = lm._loglikelihood_tokens([(("", ""), context, case) for case in cases])
    assert [greedy for _, greedy in got] == [True, True, False, False]
    check(got, [by_hand(model, context, case) for case in cases])


@pytest.mark.parametrize("settings", [{"batch": 8}, {"batch": 8, "piece": 11}, {"batch": 3, "piece": 64}])
@pytest.mark.parametrize("name", ["sw_ovq", "sw_nope", "sw_mamba2"])
def test_neither_batch_nor_piece_changes_a_score(name: str, settings: dict[str, int]) -> None:
    model = small_model(name, "model.init_std=0.3", vocab_size=257, seed=1).double().eval()
    one, many = wrap(model, batch=1), wrap(model, **settings)
    requests = [Request(pair) for pair in PAIRS]
    texts = [Request((text_of(length, length),)) for length in (1, 200, 30, 8, 77)]
    check(many.loglikelihood(requests), one.loglikelihood(requests))
    assert many.loglikelihood_rolling(texts) == pytest.approx(one.loglikelihood_rolling(texts), rel=1e-6)
    prompts = [Request((context, {"max_gen_toks": 5})) for context, _ in PAIRS]
    assert many.generate_until(prompts) == one.generate_until(prompts)


def test_a_long_context_is_read_from_its_first_token(model: Transformer) -> None:
    """Many times longer than the training length and the window; the state has no length at which to truncate it."""
    long = text_of(20 * TRAINED_AT, 5)
    lm = wrap(model, piece=50)
    (got,) = lm.loglikelihood([Request((long, " end"))])
    (other,) = lm.loglikelihood([Request(("Q" + long[1:], " end"))])
    check([got], [by_hand(model, [256, *long.encode()], b" end")])
    assert abs(got[0] - other[0]) > 1e-6


@pytest.mark.parametrize("context", ["", "a context", "ends in spaces  "])
def test_an_empty_continuation_is_certain(model: Transformer, context: str) -> None:
    lm = wrap(model)
    requests = [Request((context, "")), Request((context, "b"))]
    empty, other = lm.loglikelihood(requests)
    spaces = context[len(context.rstrip()) :]
    check(
        [empty, other], [by_hand(model, [256, *context.rstrip().encode()], f"{spaces}{x}".encode()) for x in ("", "b")]
    )
    assert (empty == (0.0, True)) == (spaces == "")


# --- tokens at the boundary ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    rng = random.Random(0)
    words = ["".join(rng.choice("aeioubdfgklmn") for _ in range(rng.randint(2, 8))) for _ in range(150)]
    lines = [" ".join(rng.choices(words, k=12)) + "." for _ in range(400)]
    return train_sentencepiece(iter(lines), 420, tmp_path_factory.mktemp("pieces") / "pieces.model")


def test_a_split_between_words_is_that_of_the_joint_encoding(pieces: SentencePieceTokenizer) -> None:
    lm = wrap(None, pieces)
    from lm_eval.api.model import TemplateLM

    words = pieces.decode(pieces.encode("bade alo mi gun a bidu kefo nalu gi do")).split(" ")
    for at in range(1, len(words)):
        context, continuation = " ".join(words[:at]), " " + " ".join(words[at:])
        got = lm._encode_pair(context, continuation)
        assert got == TemplateLM._encode_pair(lm, context, continuation)  # published numbers are split like this
        assert [*got[0], *got[1]] == lm.tok_encode(context + continuation)
        assert lm._encode_pair(context + " ", continuation[1:]) == got


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_what_is_scored_is_the_continuation_wherever_the_text_is_split(
    kind: str, pieces: SentencePieceTokenizer
) -> None:
    """Also where a token of the joint encoding spans the split, leaving less of the continuation, or nothing."""
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else pieces
    lm = wrap(None, tokenizer)
    whole, across = "bade alo miguna, caf\u00e9 bidu", 0
    for at in range(len(whole) + 1):
        before, after = lm._encode_pair(whole[:at], whole[at:])
        context = whole[:at].rstrip()
        assert before[0] == lm.eot_token_id and tokenizer.decode(before) == context
        assert tokenizer.decode(after) == whole[len(context) :]
        across += [*before, *after] != lm.tok_encode(whole)
    assert (across > 0) == (kind == "pieces")


# --- rolling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1000, 64, 7, 1])
def test_rolling_scores_every_token_once_whatever_the_piece(model: Transformer, piece: int) -> None:
    texts = ["", "a", text_of(100, 1), text_of(23, 2)]
    got = wrap(model, batch=3, piece=piece).loglikelihood_rolling([Request((text,)) for text in texts])
    assert got == pytest.approx([by_hand(model, [256], text.encode())[0] for text in texts], rel=1e-6)


# --- generation ------------------------------------------------------------------------------------------------------


class Successor(torch.nn.Module):
    """Predicts the last token plus 1, and counts the tokens it was fed. Its state must be passed on."""

    fed = 0

    def forward(self, tokens_BT: torch.Tensor, *, state: Any, **_: Any) -> ModelOutput:
        seen = 0 if state is None else state[0]
        assert seen or (tokens_BT[:, 0] == 256).all(), "a prompt begins with the separator, and goes on with a state"
        self.fed += tokens_BT.numel()
        return ModelOutput(
            logits=F.one_hot((tokens_BT[:, -1:] + 1) % 257, 257).float(), state=[seen + tokens_BT.shape[1]]
        )


def test_generation_ends_at_the_first_stop_string_the_limit_or_the_separator() -> None:
    cases = [
        ("xa", {"until": ["ef"]}, "bcd"),  # a stop string of two tokens
        ("xyza", {"until": ["hi", "fgh", "f"]}, "bcde"),  # the first match in the text, not the first in the list
        ("a", {"until": "d"}, "bc"),
        ("a", {"until": ["zz"], "max_gen_toks": 3}, "bcd"),
        ("a", {"until": [], "max_gen_toks": 0}, ""),
        ("a" * 90, {"until": ["\n"], "max_new_tokens": 2, "do_sample": False, "temperature": 0.0}, "bc"),
        ("a", {"until": None, "max_gen_toks": 1}, "b"),
        ("x", {"until": ["\n"]}, "yz{|}~\x7f" + "\ufffd" * 128),  # to byte 255, then the separator
    ]
    requests = [Request((prompt, settings)) for prompt, settings, _ in cases]
    for settings in ({"batch": 1}, {"batch": 8}, {"batch": 3, "piece": 2}):
        assert wrap(Successor(), **settings).generate_until(requests) == [answer for *_, answer in cases]


def test_generation_is_greedy_and_streams(model: Transformer) -> None:
    """Equal to full passes over all preceding tokens; each token is fed once."""
    prompts = [text_of(length, length) for length in (60, 9, 50, 33)]
    got = wrap(model, batch=4, piece=20).generate_until([Request((prompt, {"max_gen_toks": 7})) for prompt in prompts])
    made = [greedy_by_hand(model, [256, *prompt.encode()], 7) for prompt in prompts]
    assert got == [ByteTokenizer().decode(ids) for ids in made]
    successor = Successor()
    wrap(successor, piece=20).generate_until([Request(("a" * 50, {"max_gen_toks": 7}))])
    assert successor.fed == 51 + 6  # the last generated token is not fed


def test_a_task_that_asks_for_sampling_is_refused() -> None:
    lm = wrap(Successor())
    for settings in ({"do_sample": True, "temperature": 1.0}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="only greedy decoding"):
            lm.generate_until([Request(("a", {"until": ["b"], **settings}))])


# --- the command -----------------------------------------------------------------------------------------------------

CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: {metrics}
metadata: {{version: 1.0}}
"""
ROLLING = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
CLOZE = """\
task: tiny_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [
    {"question": text_of(20 + 7 * i, i), "choices": [text_of(3 + i, 40 + i), text_of(9, 60 + i)], "label": i % 2}
    for i in range(6)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks and their data; any network connection fails."""
    pytest.importorskip("lm_eval", exc_type=ImportError)
    import datasets

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    both = "[{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]"
    for name, metrics in [("tiny_qa", both), ("tiny_acc", "[{metric: acc, aggregation: mean}]")]:
        (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, folder=folder, metrics=metrics))
    (folder / "tiny_text.yaml").write_text(ROLLING.format(folder=folder))
    (folder / "tiny_cloze.yaml").write_text(CLOZE.format(folder=folder))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    settings = ["data=text", f"data.train=[{text}]", "trainer.device=cpu", f"trainer.context={TRAINED_AT}"]
    return run_folder(tmp_path, "sw_ovq", settings)


def accuracies(model: Transformer) -> tuple[float, float]:
    """acc and acc_norm of the questions, computed by hand."""
    right = [0, 0]
    for question in QUESTIONS:
        context, choices = [256, *f"Question: {question['question']}\nAnswer:".encode()], question["choices"]
        scores = [by_hand(model, context, f" {choice}".encode())[0] for choice in choices]
        for norm in (0, 1):
            normed = [score / (len(choice) if norm else 1) for score, choice in zip(scores, choices)]
            right[norm] += normed.index(max(normed)) == question["label"]
    return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)


def test_the_command_prints_a_table_and_saves_every_task(
    folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"run={run_dir}", f"include_path={folder}"]
    assert harness.main([*arguments, "tasks=[tiny_qa,tiny_acc]", "batch=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (evaluation,) = json.loads((run_dir / harness.FILE).read_text())
    acc, acc_norm = accuracies(small_model("sw_ovq", vocab_size=257, seed=3).eval())
    task = evaluation["tasks"]["tiny_qa"]
    assert (task["questions"], task["fewshot"], task["version"]) == (6, 0, 1.0)
    assert [task["metrics"][name]["value"] for name in ("acc", "acc_norm")] == pytest.approx([acc, acc_norm])
    error = (acc * (1 - acc) / 5) ** 0.5
    assert task["metrics"]["acc"]["stderr"] == pytest.approx(error)
    assert set(evaluation["tasks"]["tiny_acc"]["metrics"]) == {"acc"}
    assert printed[-4].split() == ["task", "questions", "acc", "acc_norm"]
    assert printed[-3].split()[:5] == ["tiny_qa", "6", f"{acc:.4f}", "+-", f"{error:.4f}"]
    assert printed[-2].split() == ["tiny_acc", "6", f"{acc:.4f}", "+-", f"{error:.4f}", "-"]
    assert printed[-1] == str(run_dir / harness.FILE)
    about = {name: evaluation[name] for name in ("step", "tokens", "num_centroids", "train_context", "limit")}
    assert about == {"step": 3, "tokens": 72, "num_centroids": 12, "train_context": 24, "limit": None}
    assert evaluation["parameters"] == sum(p.numel() for p in small_model("sw_ovq", vocab_size=257).parameters())


def test_tasks_join_their_evaluation_and_other_settings_begin_another(folder: Path, run_dir: Path) -> None:
    arguments = [f"run={run_dir}", f"include_path={folder}"]
    assert harness.main([*arguments, "tasks=tiny_text"]) == 0
    assert harness.main([*arguments, "tasks=tiny_cloze"]) == 0
    assert harness.main([*arguments, "tasks=tiny_text", "num_centroids=5", "limit=2"]) == 0
    first, second = json.loads((run_dir / harness.FILE).read_text())
    assert (first["num_centroids"], list(first["tasks"])) == (12, ["tiny_text", "tiny_cloze"])
    assert (second["num_centroids"], second["limit"], list(second["tasks"])) == (5, 2, ["tiny_text"])
    assert second["tasks"]["tiny_text"]["questions"] == 2

    model = small_model("sw_ovq", vocab_size=257, seed=3).eval()
    texts = [str(question["question"]) for question in QUESTIONS]
    nats = -sum(by_hand(model, [256], text.encode())[0] for text in texts)
    bits = nats / sum(map(len, texts)) / torch.log(torch.tensor(2.0)).item()
    assert first["tasks"]["tiny_text"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert first["tasks"]["tiny_text"]["metrics"]["bits_per_byte"]["stderr"] is None
    assert first["tasks"]["tiny_cloze"]["metrics"]["exact_match"]["value"] == 0


@pytest.mark.slow
def test_two_processes_share_the_model_and_give_the_same_results(folder: Path, run_dir: Path) -> None:
    """All kinds of request in one launch, with the model sharded."""
    tasks = "tasks=[tiny_cloze,tiny_qa,tiny_text,tiny_acc]"
    arguments = [f"run={run_dir}", f"include_path={folder}", tasks]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    given = [*command, "-m", "eval.harness", *arguments, f"out={folder}/two.json"]
    done = subprocess.run(given, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny_cloze") == 1  # only one process prints
    assert harness.main(arguments) == 0
    (two,), (one,) = (json.loads(file.read_text()) for file in (folder / "two.json", run_dir / harness.FILE))
    for name, task in one["tasks"].items():
        values = [metric["value"] for metric in task["metrics"].values()]
        assert [metric["value"] for metric in two["tasks"][name]["metrics"].values()] == pytest.approx(values, rel=1e-4)


def test_results_may_go_to_another_file(folder: Path, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "mine.json"
    assert harness.main([f"run={run_dir}", f"include_path={folder}", "tasks=tiny_acc", "limit=1", f"out={out}"]) == 0
    assert json.loads(out.read_text())[0]["tasks"] and not (run_dir / harness.FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=no/such/run"], "no/such/run is not a run folder"),
        (["tasks=[tiny_acc,nosuch]"], "lm-eval has no tasks nosuch; list its own with: lm-eval ls tasks"),
        (["tasks=[broken]"], "the tasks ['broken'] cannot be loaded: "),
        (["include_path=no/such"], "include_path=no/such is not a folder"),
        (["metadata=[1,2]"], "metadata=[1,2] must be a JSON object"),
        (["batch=0"], "batch=0 must be at least 1"),
        (["num_centroids=0"], "num_centroids=0 must be at least 1"),
        (["out=OTHER"], "holds no results of this command"),
    ],
)
def test_impossible_requests_are_one_line(
    folder: Path,
    run_dir: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from eval import harness_model

    class Own(harness_model.Tasks):
        """Without the harness's own tasks, which take seconds to index."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"include_defaults": False})

    monkeypatch.setattr(harness_model, "Tasks", Own)
    (folder / "broken.yaml").write_text(ROLLING.format(folder=folder / "absent").replace("tiny_text", "broken"))
    (folder / "other.json").write_text('{"a": 1}')
    arguments = [argument.replace("OTHER", str(folder / "other.json")) for argument in arguments]
    given = [f"run={run_dir}", f"include_path={folder}", "tasks=tiny_acc", *arguments]
    assert harness.main(list({text.partition("=")[0]: text for text in given}.values())) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and says in last
    assert not (run_dir / harness.FILE).exists()


def test_a_run_on_a_generated_task_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data=recall", "data.task.key_vocab=244", "data.task.value_vocab=12"]
    other = run_folder(tmp_path / "other", "sw", settings)
    assert harness.main([f"run={other}", f"include_path={folder}", "tasks=tiny_acc"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on a generated task, whose ids stand for no text" in line


def test_without_the_package_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "eval.harness_model", raising=False)
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    assert harness.main(["run=runs/any"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: lm-evaluation-harness cannot be imported") and "pip install -e '.[lm-eval]'" in line
    assert harness.main(["--help"]) == 0
