"""Pairs made from tasks and read from files: what is wrong with the worse one, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mmada.data.preferences import KINDS, PairRows, PreferencePair, preferences_of_tasks, read_preferences
from mmada.data.tasks import TaskSource, load_tasks
from mmada.errors import DataError
from mmada.reward_model import COMPONENTS, scored_ids
from mmada.tokenizer import ByteTokenizer

SUMS = TaskSource("chain_sum", size=60, held_out=20, config={"min_terms": 2, "max_terms": 2, "max_digits": 2})
CORRECTNESS = COMPONENTS.index("correctness")


@pytest.fixture(scope="module")
def sums():
    tasks = load_tasks(SUMS)
    return tasks, preferences_of_tasks(tasks, seed=3)


def test_every_problem_gives_a_pair_of_each_kind_and_the_verifier_agrees(sums):
    tasks, found = sums
    by_prompt = {item.prompt: item for item in (*tasks.train, *tasks.held_out)}
    assert {pair.kind for pair in found.train} == set(KINDS)
    assert 0.9 * 4 * 60 < len(found.train) <= 4 * 60
    for pair in (*found.train, *found.held_out):
        item = by_prompt[pair.prompt]
        assert pair.chosen == item.answer
        assert tasks.score(item, pair.rejected) < tasks.score(item, pair.chosen) == 1.0
        assert pair.chosen_scores[CORRECTNESS] == 1.0
        assert pair.rejected_scores[CORRECTNESS] == 2 * tasks.score(item, pair.rejected) - 1
        assert all(-1 <= score <= 1 for score in (*pair.chosen_scores, *pair.rejected_scores))


def test_each_kind_is_wrong_in_its_own_way(sums):
    tasks, found = sums
    answers = {item.answer for item in tasks.train}
    mean = {}
    for kind in KINDS:
        pairs = [pair for pair in found.train if pair.kind == kind]
        mean[kind] = np.mean([np.subtract(pair.chosen_scores, pair.rejected_scores) for pair in pairs], axis=0)
        for pair in pairs:
            right, wrong = pair.chosen, pair.rejected
            if kind == "near":
                assert len(wrong) == len(right) and sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
            elif kind == "other":
                assert wrong in answers
            elif kind == "repetitive":
                assert wrong == right * (len(wrong) // len(right)) and len(wrong) >= 3 * len(right)
            else:
                assert len(wrong) == len(right)
    of = dict(zip(COMPONENTS, range(4), strict=True))
    assert mean["corrupted"][of["coherence"]] > 0.5 > mean["near"][of["coherence"]]
    assert mean["repetitive"][of["creativity"]] > 0.5 > abs(mean["near"][of["creativity"]])


def test_another_process_makes_the_same_pairs_and_another_seed_others(sums):
    program = (
        "from mmada.data.preferences import preferences_of_tasks as make\n"
        "from tests.mmada.data.test_preferences import SUMS, load_tasks\n"
        "print(make(load_tasks(SUMS), 3).fingerprint)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == sums[1].fingerprint
    assert preferences_of_tasks(sums[0], seed=4).fingerprint != sums[1].fingerprint


def test_words_get_neighbours_exchanged_and_choices_another_choice():
    words = preferences_of_tasks(load_tasks(TaskSource("spell_backward", size=40, held_out=5)), 0)
    near, corrupted = ([pair for pair in words.train if pair.kind == kind] for kind in ("near", "corrupted"))
    assert np.mean([pair.chosen_scores[0] - pair.rejected_scores[0] for pair in corrupted]) > 0.5  # faithfulness
    assert near and all(sorted(pair.chosen) == sorted(pair.rejected) for pair in near)
    choices = preferences_of_tasks(load_tasks(TaskSource("syllogism", size=40, held_out=5)), 0)
    assert {pair.rejected for pair in choices.train if pair.kind == "near"} == {"Yes", "No"}


def write(path, *lines) -> str:
    path.write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return str(path)


def pair(number: int, **more):
    return {"prompt": f"question {number}", "chosen": "good", "rejected": "bad", **more}


def test_pairs_are_read_with_the_scores_that_are_there(tmp_path):
    lines = [pair(n, chosen_scores={"coherence": 0.5}, rejected_scores={"correctness": -1}) for n in range(40)]
    lines += [pair(n, chosen="better") for n in range(40)]  # the same prompts once more
    found = read_preferences(write(tmp_path / "pairs.jsonl", *lines), held_out=0.3)
    assert len(found.train) + len(found.held_out) == 80 and 4 < len(found.held_out) < 50
    assert {p.prompt for p in found.train}.isdisjoint(p.prompt for p in found.held_out)
    first = next(p for p in found.train if p.chosen == "good")
    assert first.chosen_scores == (None, 0.5, None, None) and first.rejected_scores == (None, None, -1, None)
    rows = PairRows(found.train, ByteTokenizer(), 32)
    proxies = rows.batch(np.array([0]))["proxies"]
    assert proxies.shape == (1, 2, 4) and proxies[0, 0, 1] == 0.5 and proxies.isnan().sum() == 6
    assert len(read_preferences(str(tmp_path), 0.3, limit=10).train) < 11  # a folder of files


def test_characters_that_end_lines_elsewhere_may_stand_in_a_pair(tmp_path):
    lines = [json.dumps(pair(n) | {"prompt": f"{n}\u2028\x85 and more"}, ensure_ascii=False) for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    found = read_preferences(str(tmp_path / "pairs.jsonl"), 0.3)
    assert {p.prompt for p in (*found.train, *found.held_out)} == {f"{n}\u2028\x85 and more" for n in range(20)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ({"prompt": "a", "chosen": "b"}, "line 2 is no preference pair"),
        ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}, "line 2 is no preference pair"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2 prefers a completion to itself"),
        (pair(2, chosen_scores={"beauty": 1}), "line 2: chosen_scores is not by component"),
        (pair(2, rejected_scores={"coherence": 3}), "rejected_scores.coherence=3 is no number from -1 to 1"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_by_its_number(tmp_path, line, said):
    with pytest.raises(DataError, match=said):
        read_preferences(write(tmp_path / "pairs.jsonl", pair(1), line), 0.5)


def test_a_side_without_pairs_is_refused(tmp_path):
    with pytest.raises(DataError, match="gives no preference pair"):
        read_preferences(write(tmp_path / "pairs.jsonl", pair(1)), 0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*.jsonl"):
        read_preferences(str(tmp_path / "empty"), 0.5)


def test_rows_hold_what_is_scored_and_refuse_what_is_too_long():
    tokenizer = ByteTokenizer()
    one = PreferencePair("q: ", "yes", "not at all")
    batch = PairRows([one, replace(one, chosen="no")], tokenizer, 15).batch(np.array([1, 0]))
    assert batch["input_ids"].shape == (2, 2, 15)
    for row, texts in enumerate((("no", "not at all"), ("yes", "not at all"))):
        for side, text in enumerate(texts):
            ids = batch["input_ids"][row, side][batch["attention_mask"][row, side].bool()].tolist()
            assert ids == scored_ids(tokenizer, "q: ", text)
    with pytest.raises(DataError, match="train.sequence_length=14 is too short .* 15 tokens"):
        PairRows([one], tokenizer, 14)
