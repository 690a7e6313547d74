"""Claims about needles: they lie at their depth, only the context gives the answer, and every cell is measured."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.build import build_corpus
from data.tasks.base import IGNORE, TEST, TRAIN
from data.tasks.needle import KINDS, PASSAGE, NeedleTask, distinct
from data.tasks.needle_words import ADJECTIVES, NOUNS
from data.tasks.rows import sequences_for_test
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from data.train_tokenizer import main as train_tokenizer
from eval import needle
from eval.per_position import main as per_position
from ovq.compose import compose
from ovq.config import save
from ovq.errors import ConfigError
from ovq.inference.run import load_run
from tests.data_helpers import learned_guess, write_jsonl
from tests.helpers import small_config
from tests.test_per_position import run_folder

SENTENCE = re.compile(r"\nThe magic (number|uuid) for (\S+) is: ([0-9a-f-]+)")
NUMBER, UUID, WORD = r"\d{7}", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"[a-z]+-[a-z]+"
BYTES = ByteTokenizer()


def text_of(documents: int = 3) -> str:
    corpus = build_corpus(compose(["data=builtin"]), "validation")
    return "\n\n".join(corpus.read(index).text for index in range(documents))


TEXT = text_of()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small SentencePiece model, trained on the text."""
    folder = tmp_path_factory.mktemp("pieces")
    write_jsonl(folder / "text.jsonl", [TEXT[i : i + 4000] for i in range(0, 120_000, 4000)])
    arguments = ["data=jsonl", f"data.train=[{folder}/text.jsonl]", f"out={folder}/a.model", "vocab_size=700"]
    assert train_tokenizer(arguments) == 0
    return SentencePieceTokenizer((folder / "a.model").read_bytes())


def task_of(kind: str, depth: float | None = None, tokenizer: Tokenizer = BYTES) -> NeedleTask:
    return NeedleTask(tokenizer.encode(TEXT).astype(np.int64), tokenizer, kind=kind, depth=depth)


# --- sequences -------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """The parts of a sequence. `hidden`: the needles in the haystack, each as (key, value, offset in `rest`). `rest`:
    the haystack without them. `reminders`: those the question repeats. In a haystack of needles, all are hidden."""

    hidden: list[tuple[str, str, int]]
    reminders: list[tuple[str, str]]
    key: str
    answer: str
    rest: str


def parts_of(task: NeedleTask, inputs: np.ndarray) -> Parts:
    text = BYTES.decode(inputs)
    *needles, question = SENTENCE.finditer(text)
    asked = len(needles) - task.parts.same
    hidden, rest, last = [], "", 0
    for match in needles[:asked]:
        rest += text[last : match.start()]
        hidden.append((match[2], match[3], len(rest)))
        last = match.end() + len(".\n")
    rest += text[last : (needles[asked:] + [question])[0].start()]
    assert text.endswith(question[0])
    return Parts(hidden, [(match[2], match[3]) for match in needles[asked:]], question[2], question[3], rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1000, 8192])
def test_a_kind_hides_what_its_name_says(kind: str, length: int) -> None:
    task, wanted = task_of(kind), KINDS[kind]
    inputs, targets = task.make(length, 1, TEST, 0, 0)
    found = parts_of(task, inputs)
    keys, values = [key for key, _, _ in found.hidden], [value for _, value, _ in found.hidden]
    assert BYTES.decode(targets[targets != IGNORE]) == " " + found.answer
    assert all(re.fullmatch(UUID if wanted.keys == "uuid" else WORD, key) for key in keys)
    assert all(re.fullmatch(UUID if wanted.values == "uuid" else NUMBER, value) for value in values)
    assert len(set(values)) == len(values)
    of_key = {value for key, value in zip(keys, values) if key == found.key}
    assert len(of_key) == 1 + wanted.same and len(found.reminders) == wanted.same
    assert {key for key, _ in found.reminders} <= {found.key}
    assert of_key - {value for _, value in found.reminders} == {found.answer}
    if wanted.haystack == "needles":
        assert (
            len(set(keys)) == len(keys) == pytest.approx(length / (120 if kind == "niah_multikey_3" else 50), rel=0.3)
        )
        assert len(found.rest) < 120, "there is something between the needles"
    else:
        assert len(keys) == 1 + wanted.others + wanted.same and len(set(keys)) == 1 + wanted.others
        assert found.rest in (TEXT if wanted.haystack == "text" else PASSAGE * (length // 80)), "it is not one stretch"


@pytest.mark.parametrize("kind", KINDS)
def test_depth_moves_the_needle_and_nothing_else(kind: str) -> None:
    shares, others = [], []
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = task_of(kind, depth)
        found = parts_of(task, task.make(4096, 2, TEST, 0, 5)[0])
        (place,) = (n for n, needle in enumerate(found.hidden) if needle[:2] == (found.key, found.answer))
        offset = found.hidden[place][2] / len(found.rest) if len(found.rest) > 200 else place / (len(found.hidden) - 1)
        shares.append(offset)
        others.append((found.rest, found.reminders, [needle for n, needle in enumerate(found.hidden) if n != place]))
    # Accurate to a word of the text, or to a sentence of the passage or of the needles.
    assert np.allclose(shares, [0, 0.25, 0.5, 1], atol=0.01 if KINDS[kind].haystack == "text" else 0.03), shares
    assert all(other == others[0] for other in others)


def test_without_a_depth_needles_are_spread_over_the_text() -> None:
    found = []
    for row in range(200):
        text = BYTES.decode(task_of("niah_single_2").make(2048, 0, TEST, 0, row)[0])
        found.append(text.index("\nThe magic") / text.rindex("\nThe magic"))
    assert max(found) > 0.95 and min(found) < 0.05 and 0.4 < np.mean(found) < 0.6


def test_a_needle_stands_between_words() -> None:
    for row in range(50):
        text = BYTES.decode(task_of("niah_single_2").make(1500, 0, TEST, 0, row)[0])
        match = SENTENCE.search(text)
        assert match
        before, after = text[match.start() - 1 : match.start()], text[match.end() + 2 :][:1]
        assert match.start() == 0 or before.isspace() or after.isspace(), text[match.start() - 20 : match.end() + 20]


def test_the_first_token_is_a_separator_and_the_haystack_has_none(pieces: Tokenizer) -> None:
    for tokenizer in (BYTES, pieces):
        inputs, _ = task_of("niah_single_2", 0.3, tokenizer).make(1024, 0, TEST, 0, 0)
        assert np.flatnonzero(inputs == tokenizer.separator_id).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, 2048, 30_000])
def test_in_pieces_too_an_oracle_answers_everything(kind: str, length: int, pieces: Tokenizer) -> None:
    task = task_of(kind, 0.4, pieces)
    for row in range(3):
        inputs, targets = task.make(length, 4, TRAIN, 0, row)
        assert len(inputs) == length and inputs.max() < pieces.vocab_size
        assert np.array_equal(task.oracle(inputs), targets) and task.score(task.oracle(inputs), targets) == (1, 1)
        *_, last = SENTENCE.finditer(pieces.decode(inputs))
        assert pieces.decode(targets[targets != IGNORE]) == " " + last[3], "the answer is not the text's"


def test_a_question_alone_predicts_no_better_than_chance() -> None:
    """The best guess of a digit from its position, alone or with the question's last letters, learned from others."""
    task = task_of("niah_single_2")
    # Of 8 bytes, the space is certain, the first digit one of 9, the others one of 10. 3,200 labels: deviation 0.7%.
    chance = (1 + 1 / 9 + 6 / 10) / 8
    for feature in (lambda x, at: at, lambda x, at: (at, x[-16:-12].tobytes())):
        assert abs(learned_guess(task, 150, feature, learn=1500, test=400) - chance) < 0.025


def test_who_finds_the_key_but_not_which_value_is_missing_is_right_once_in_four_times() -> None:
    right = 0
    for row in range(400):
        text = BYTES.decode(task_of("niah_multivalue").make(700, 0, TEST, 0, row)[0])
        *needles, (_, key, answer) = [match.groups() for match in SENTENCE.finditer(text)]
        right += [value for _, k, value in needles if k == key][0] == answer
    assert abs(right / 400 - 1 / 4) < 0.09  # four standard deviations


def test_no_other_needle_has_the_key_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tasks.needle.ADJECTIVES", ADJECTIVES[:8])  # 64 keys, of which a sequence has about 20
    monkeypatch.setattr("data.tasks.needle.NOUNS", NOUNS[:8])
    task = task_of("niah_multikey_2")
    for row in range(20):
        found = parts_of(task, task.make(1000, 0, TEST, 0, row)[0])
        keys = [key for key, _, _ in found.hidden]
        assert keys.count(found.key) == 1 and len(set(keys)) == len(keys) > 15


def test_words_are_many_and_all_different() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    assert all(word.isalpha() and word.islower() for word in [*ADJECTIVES, *NOUNS])
    made = distinct("word", 20_000, np.random.default_rng(0), besides="amber-acorn")
    assert len(set(made)) == 20_000 and "amber-acorn" not in made


@pytest.mark.parametrize(
    ("kind", "depth", "length", "words"),
    [
        ("niah_single_9", 0.5, 1000, "there is no needle kind 'niah_single_9'; legal: niah_single_1, "),
        ("niah_single_1", 1.5, 1000, "the depth of a needle, 1.5, must be in 0 to 1"),
        ("niah_single_1", 0.5, 60, "a niah_single_1 sequence takes at least "),
        ("niah_single_2", 0.5, 1 << 20, "the haystack has "),
        ("niah_multikey_2", 0.5, 1 << 22, "needles need as many different keys, of which there are 32208"),
    ],
)
def test_impossible_sequences_fail_in_one_line(kind: str, depth: float, length: int, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(kind, depth).make(length, 0, TEST, 0, 0)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_sequences_have_next_to_no_haystack(kind: str) -> None:
    task = task_of(kind, 0.5)
    with pytest.raises(ConfigError) as error:
        task.describe(2)
    shortest = int(re.findall(r"at least (\d+) tokens", str(error.value))[0]) + 100  # keys differ in length
    for row in range(20):
        inputs, targets = task.make(shortest, 0, TEST, 0, row)
        assert len(inputs) == shortest and np.array_equal(task.oracle(inputs), targets)


# --- the tool --------------------------------------------------------------------------------------------------------

SMALL = ["lengths=[512,900]", "depths=[0,100]", "sequences=3", "kinds=[niah_single_2,niah_multikey_1]"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return run_folder(tmp_path, "sw_ovq", ["data=builtin"])


def test_every_cell_has_the_scores_of_one_pass_over_its_sequences(run_dir: Path) -> None:
    assert needle.main([f"run={run_dir}", *SMALL, "piece=100"]) == 0
    rows = needle.TABLE.read(run_dir)
    assert [(r["kind"], r["length"], r["depth"]) for r in rows] == [
        (kind, length, depth)
        for kind in ("niah_single_2", "niah_multikey_1")
        for length in (512, 900)
        for depth in (0, 100)
    ]
    run = load_run(run_dir)
    haystack = needle.read_haystack(compose(["data=builtin"]), BYTES, "validation")
    for row in rows:
        task = NeedleTask(haystack, BYTES, kind=row["kind"], depth=row["depth"] / 100)
        batch = next(sequences_for_test(task, row["length"], seed=row["seed"], rows=3, batch=3))
        with torch.no_grad():
            out = run.model(batch.inputs, targets_BT=batch.targets, reduction="none")
        assert row["log_p"] == pytest.approx(-float(out.loss.sum()) / 3, rel=1e-4) and row["answer_tokens"] == 8
        assert row["sequences"] == 3 and row["exact"] == 0 and row["model"] == "sw_ovq" and row["window"] == 7
        assert row["pattern"] == "sliding_window,ovq" and row["train_tokens"] == 72
        assert row["state_bytes"] == 4 * row["state_numbers"] > 0
        assert row["parameters"] == sum(p.numel() for p in run.model.parameters())


class Perfect:
    """Stands in for `predict`: right except where the needle is at the end of the text; counts its calls."""

    calls = 0

    def __call__(self, model: Any, inputs: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[Any, Any]:
        self.calls += 1
        predicted = targets.numpy().copy()
        for row, tokens in zip(predicted, inputs.numpy()):
            text = BYTES.decode(tokens)
            *needles, last = SENTENCE.finditer(text)
            if any(m[3] == last[3] and last.start() - m.end() < 10 for m in needles):
                row[-2] += 1
        return predicted, np.where(targets.numpy() == IGNORE, 0.0, -0.5)


def test_exact_answers_are_counted_in_the_cell_of_their_depth(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "predict", Perfect())
    assert needle.main([f"run={run_dir}", *SMALL]) == 0
    for row in needle.TABLE.read(run_dir):
        assert row["exact"] == (0.0 if row["depth"] == 100 else 1.0) and row["log_p"] == -4.0
    written = list(csv.DictReader((run_dir / "needle.csv").open()))
    assert list(written[0]) == needle.TABLE.schema.names and len(written) == 8
    for name in ("exact", "log_p"):
        assert (run_dir / "plots" / f"needle_builtin_validation_{name}.png").stat().st_size > 5000


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_is_not_repeated(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Perfect):
        def __call__(self, *args: Any) -> tuple[Any, Any]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(*args)

    monkeypatch.setattr(needle, "predict", Interrupted())
    assert needle.main([f"run={run_dir}", *SMALL]) == 130
    assert len(needle.TABLE.read(run_dir)) == 3
    calls = []
    two = "sequences=2"
    for more in ([], [], [two], ["seed=2", two], ["num_centroids=5", two], ["model.mixers.ovq.seeding=random", two]):
        stand_in = Perfect()
        monkeypatch.setattr(needle, "predict", stand_in)
        assert needle.main([f"run={run_dir}", *[o for o in SMALL if o[:9] not in [m[:9] for m in more]], *more]) == 0
        calls.append(stand_in.calls)
    assert calls == [5, 0, 8, 8, 8, 8]
    rows = needle.TABLE.read(run_dir)
    assert len(rows) == 32 and sum(row["changes"] != "" for row in rows) == 8
    assert {row["num_centroids"] for row in rows} == {None, 5}
    shown = capsys.readouterr()
    assert "512 tokens fed, depth   0%: exact  100.0%, log p    -4.000 nats for 8.0 tokens (2 sequences)" in shown.err
    assert "niah_multikey_1" in shown.out and "needle.parquet" in shown.out


def test_averaged_weights_are_not_taken_for_the_trained_ones(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval.weights` may change when a run is resumed, so scores of the weights before it are not those to report."""
    monkeypatch.setattr(needle, "predict", Perfect())
    assert needle.main([f"run={run_dir}", *SMALL]) == 0
    opened = load_run(run_dir)
    opened.cfg.eval.weights = "ema"
    options = needle.Options(run=str(run_dir), kinds=["niah_single_2"], lengths=[512], depths=[0], sequences=3)
    needle.measure(opened, options, compose(["data=builtin"]))
    assert [row["weights"] for row in needle.TABLE.read(run_dir)] == ["trained"] * 8 + ["ema"]


def test_a_damaged_table_is_set_aside_and_a_new_one_begun(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "needle.parquet").write_bytes(b"no table")
    monkeypatch.setattr(needle, "predict", Perfect())
    assert needle.main([f"run={run_dir}", *SMALL]) == 0
    assert "is not a table of needles" in capsys.readouterr().err and len(needle.TABLE.read(run_dir)) == 8
    assert (run_dir / "needle.damaged.parquet").read_bytes() == b"no table"


def test_the_haystack_is_that_of_the_data_set_named(run_dir: Path, tmp_path: Path) -> None:
    books = write_jsonl(tmp_path / "books.jsonl", ["first book " * 100, "second book " * 100])
    cfg = compose(["data=jsonl", f"data.test=[{books}]"])
    expected = "first book " * 100 + "\n\n" + "second book " * 100 + "\n\n"
    assert BYTES.decode(needle.read_haystack(cfg, BYTES, "test")) == expected
    more = ["lengths=[600]", "depths=[50]", "sequences=1", "kinds=[niah_single_2]"]
    assert needle.main([f"run={run_dir}", "data=jsonl", f"data.test=[{books}]", "split=test", *more]) == 0
    assert needle.main([f"run={run_dir}", "data=run", *more]) == 0
    rows = needle.TABLE.read(run_dir)
    assert [(row["data"], row["split"]) for row in rows] == [("jsonl", "test"), ("builtin", "validation")]
    assert rows[0]["haystack"] != rows[1]["haystack"]


def test_a_length_with_room_for_some_sequences_only_is_refused_before_the_work(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fits(length: int, index: int) -> bool:
        try:
            task_of("niah_multivalue").make(length, 0, TEST, 0, index)
        except ConfigError:
            return False
        return True

    length = next(length for length in range(300, 500) if fits(length, 0))
    assert not all(fits(length, index) for index in range(8)), "words differ in length"
    monkeypatch.setattr(needle, "score", lambda *_: pytest.fail("measured before looking at every sequence"))
    line = ["kinds=[niah_multivalue]", f"lengths=[{length}]", "depths=[0]", "sequences=8", "seed=0"]
    assert needle.main([f"run={run_dir}", *line]) == 2
    assert "a niah_multivalue sequence takes at least " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kinds=[niah]"], "kinds=[niah] is not a legal value; legal: niah_single_1, "),
        (["lengths=[512,40]"], "sequence takes at least "),
        (["lengths=[3000000]"], "tokens, and 29"),
        (["depths=[101]"], "depths=[101] must be at least 0 and at most 100"),
        (["data=nowhere"], "data=nowhere"),
        (["data=jsonl"], "data.validation is empty"),
        (["data=recall"], "data.kind=task holds no text"),
        (["trainer.precision=fp8"], "trainer.precision=fp8"),
        (["lenghts=[5]"], "there is no option 'lenghts'"),
    ],
)
def test_impossible_requests_are_one_line_and_nothing_is_written(
    run_dir: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle.main([f"run={run_dir}", "kinds=[niah_single_2]", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (run_dir / "needle.parquet").exists()


def test_a_run_without_ids_for_text_or_without_a_dictionary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_folder(tmp_path / "other", "sw", ["data=recall", "data.task.key_vocab=244", "data.task.value_vocab=12"])
    assert needle.main([f"run={other}"]) == 2
    assert "was trained on a generated task, whose ids stand for no text" in capsys.readouterr().err
    plain = run_folder(tmp_path / "plain", "sw", ["data=builtin"])
    assert needle.main([f"run={plain}", "num_centroids=64"]) == 2
    assert "eval.num_centroids=64: no layer has a dictionary" in capsys.readouterr().err


def test_options_that_are_no_settings_of_a_run_do_not_reach_it(run_dir: Path) -> None:
    """`sequences` and `seed` are the tool's own; `piece` and `split` override the run's, as other tools' options do."""
    options = needle.Options(run=str(run_dir), piece=33, split="test", seed=9)
    run = options.open()
    assert (run.cfg.eval.piece, run.cfg.eval.split, run.cfg.seed) == (33, "test", 0)
    save(small_config("sw_ovq", "data=builtin", "eval.context=64", "eval.documents=1"), run_dir)
    assert per_position([f"run={run_dir}", "context=32"]) == 0
