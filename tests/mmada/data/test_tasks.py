"""Tasks: the same in every process, held out truly held out, and scored without running what was written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym

from mmada.data.task_scoring import is_formula
from mmada.data.tasks import TaskSet, TaskSource, load_tasks
from mmada.errors import DataError

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def prompts(items: list) -> list[str]:
    return [item.prompt for item in items]


def test_held_out_questions_are_nowhere_in_training_and_all_are_different():
    tasks = load_tasks(TaskSource("chain_sum", size=300, held_out=80, config=SMALL))
    assert len(set(prompts(tasks.held_out))) == 80 and len(set(prompts(tasks.train))) == 300 == tasks.num_distinct
    assert not set(prompts(tasks.held_out)) & set(prompts(tasks.train))
    assert [item.index for item in tasks.train] == list(range(300))


def test_held_out_stays_the_same_when_more_is_trained_on():
    small, large = (load_tasks(TaskSource("gcd", size=size, held_out=20)) for size in (30, 60))
    assert prompts(small.held_out) == prompts(large.held_out) and prompts(small.train) == prompts(large.train)[:30]


def test_a_family_with_few_questions_repeats_them_in_training_alone():
    source = TaskSource("chain_sum", size=500, held_out=50, config={**SMALL, "max_digits": 1})
    tasks = load_tasks(source)
    assert tasks.num_distinct == 150 and len(tasks.train) == 500  # 200 questions: 10 · 10 operands, + or -
    assert prompts(tasks.train)[:150] == prompts(tasks.train)[150:300]
    assert not set(prompts(tasks.held_out)) & set(prompts(tasks.train))


def test_too_few_questions_to_hold_out_is_refused_with_their_number():
    with pytest.raises(
        DataError, match="tasks.held_out=200 is too much for chain_sum, which has 200 different questions"
    ):
        load_tasks(TaskSource("chain_sum", held_out=200, config={**SMALL, "max_digits": 1}))


def test_families_take_turns_with_fields_of_their_own():
    config = {"chain_sum": SMALL, "spell_backward": {"min_word_len": 3, "max_word_len": 4}}
    tasks = load_tasks(TaskSource(("chain_sum", "spell_backward", "gcd"), size=10, held_out=4, config=config))
    assert [item.family for item in tasks.train] == ["chain_sum", "spell_backward", "gcd"] * 3 + ["chain_sum"]
    assert [item.family for item in tasks.held_out] == ["chain_sum", "spell_backward", "gcd", "chain_sum"]
    assert len(set(prompts(tasks.train + tasks.held_out))) == 14
    assert all(len(item.answer) in (3, 4) for item in tasks.train if item.family == "spell_backward")
    assert all(tasks.score(item, item.answer) == 1 for item in tasks.train + tasks.held_out)


def test_the_same_source_gives_the_same_items_in_another_process():
    source = TaskSource(("chain_sum", "knights_knaves", "acre", "family_relationships"), size=12, held_out=4)
    code = (
        "from mmada.data.tasks import TaskSource, load_tasks; import random; random.random();"
        f"print(load_tasks(TaskSource({source.family!r}, size=12, held_out=4)).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[3])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == load_tasks(source).fingerprint


def test_the_fingerprint_tells_items_apart():
    def fingerprint(**changes: object) -> str:
        return load_tasks(TaskSource(**{"family": "chain_sum", "size": 20, "held_out": 5, **changes})).fingerprint

    kinds = [{}, {"seed": 1}, {"difficulty": 1}, {"size": 21}, {"template": "Q: {question}\n"}, {"config": SMALL}]
    assert len({fingerprint(**changes) for changes in kinds}) == len(kinds) and fingerprint() == fingerprint()


def test_neighbouring_seeds_share_no_run_of_items():
    first, second = (load_tasks(TaskSource("base_conversion", size=100, held_out=0, seed=seed)) for seed in (0, 1))
    assert len(set(prompts(first.train)) & set(prompts(second.train))) < 10


def test_difficulty_raises_every_attribute_to_its_last_level_at_most():
    def digits(difficulty: int) -> TaskSet:
        return load_tasks(TaskSource("chain_sum", difficulty=difficulty, size=40, held_out=0))

    def metadata(tasks: TaskSet) -> set[tuple]:
        return {tuple(item.entry["metadata"]["difficulty"].values()) for item in tasks.train}

    assert metadata(digits(0)) == {((2, 2), (1, 1))}
    assert metadata(digits(3)) == {((2, 5), (1, 4))}
    assert metadata(digits(99)) == {((2, 12), (1, 10))}


def test_config_counts_after_difficulty():
    tasks = load_tasks(TaskSource("chain_sum", difficulty=5, size=20, held_out=0, config={"max_terms": 3}))
    difficulty = tasks.train[0].entry["metadata"]["difficulty"]
    assert difficulty == {"num_terms": (2, 3), "num_digits": (1, 6)}


def test_a_question_with_braces_stands_in_the_template_as_it_is():
    tasks = load_tasks(TaskSource("palindrome_generation", size=2, held_out=0, template="{x} {question} {question}"))
    item = tasks.train[0]
    assert item.prompt == f"{{x}} {item.entry['question']} {item.entry['question']}"


@pytest.mark.parametrize("family", ["graph_color", "propositional_logic", "rush_hour"])
def test_families_without_an_answer_still_score(family: str):
    tasks = load_tasks(TaskSource(family, size=1, held_out=0))
    assert tasks.train[0].answer is None
    assert tasks.score(tasks.train[0], "") == 0 and 0 <= tasks.score(tasks.train[0], "nothing of use") < 1


def test_white_space_around_a_completion_does_not_count():
    tasks = load_tasks(TaskSource("spell_backward", size=1, held_out=0))
    item = tasks.train[0]
    assert tasks.score(item, f" {item.answer}\n\n") == 1 and tasks.score(item, "?") == 0


def test_a_scorer_that_raises_is_heard():
    tasks = load_tasks(TaskSource("prime_factorization", size=1, held_out=0))
    with pytest.raises(ValueError, match="invalid literal"):
        tasks.score(tasks.train[0], "no number")


# What runs a text as Python would leave a file behind; each is an answer to the family where it stays harmless.
RUNS = "[__import__('pathlib').Path({path!r}).write_text('x')]"


@pytest.mark.parametrize(
    ("family", "config", "answer", "score"),
    [
        ("string_insertion", {}, lambda item: repr(list(item.answer)), 0.1),
        ("spiral_matrix", {}, lambda item: "[" + item.answer.replace(" ", ", ") + "]", 0.1),
        (
            "binary_matrix",
            {},
            lambda item: repr([[int(x) for x in row.split()] for row in item.answer.split("\n")]),
            0.1,
        ),
        (
            "n_queens",
            {"n": 4, "min_remove": 1, "max_remove": 2},
            lambda item: repr([r.split() for r in item.answer.split("\n")]),
            0.5,
        ),
        ("countdown", {}, lambda item: item.answer, 1.0),
        ("puzzle24", {}, lambda item: item.answer, 1.0),
        ("simple_integration", {}, lambda item: item.answer, 1.0),
        ("intermediate_integration", {}, lambda item: item.answer, 1.0),
    ],
)
def test_no_scorer_runs_what_was_written_and_answers_still_count(family, config, answer, score, tmp_path: Path):
    tasks = load_tasks(TaskSource(family, size=6, held_out=0, config=config))
    written = tmp_path / "written"
    for text in (RUNS.format(path=str(written)), RUNS.format(path=str(written))[1:-1], f"open({str(written)!r}, 'w')"):
        unsafe, empty = tasks.score(tasks.train[0], text), tasks.score(tasks.train[0], "")
        assert unsafe == empty < 0.1 and not written.exists()
    for item in tasks.train:
        assert tasks.score(item, answer(item)) == pytest.approx(score)
        assert tasks.score(item, item.answer) == 1


@pytest.mark.parametrize(
    ("family", "config", "texts"),
    [  # names that the scorers have for what is right
        ("string_insertion", {}, ["entry['answer']", "oracle_answer", "[oracle_answer][0]"]),
        ("spiral_matrix", {}, ["[entry['answer']]", "[oracle_answer]"]),
        ("binary_matrix", {}, ["entry['metadata']['solution']"]),
        ("n_queens", {"n": 4, "min_remove": 1, "max_remove": 2}, ["entry['metadata']['solutions'][0]"]),
    ],
)
def test_no_completion_can_ask_for_the_answer(family, config, texts):
    tasks = load_tasks(TaskSource(family, size=2, held_out=0, config=config))
    assert [tasks.score(tasks.train[0], text) for text in texts] == [0.0] * len(texts)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("family", ["simple_integration", "intermediate_integration"])
def test_powers_that_would_never_end_are_not_begun(family):
    tasks = load_tasks(TaskSource(family, size=1, held_out=0))
    for text in ("9**9**9", "9**(9**9)", "(((9**99)**99)**99)**99", "2**1e9", "x**x**x"):
        assert tasks.score(tasks.train[0], text) == 0
    assert is_formula("x**(3/2)/3 - (x**2 + 1)**10/4 + exp(-x)**2 + C", {})


def test_the_guard_is_needed_where_it_stands(tmp_path: Path):
    unguarded, written = reasoning_gym.create_dataset("string_insertion", size=1, seed=0), tmp_path / "written"
    unguarded.score_answer(RUNS.format(path=str(written)), unguarded[0])
    assert written.exists()


def test_the_process_own_random_numbers_are_left_alone():
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).random()
    load_tasks(TaskSource("pool_matrix", size=2, held_out=0))
    assert (random.random(), np.random.random()) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "chain_sun"}, "tasks.family=chain_sun is unknown; did you mean chain_sum?"),
        ({"family": "zzzz"}, "tasks.family=zzzz is unknown; the families are "),
        ({"family": "word_ladder"}, "tasks.family=word_ladder makes other items in every process"),
        ({"family": "composite"}, "give a list of families instead"),
        ({"family": ()}, "must name one family or more"),
        ({"family": ("gcd", "gcd")}, "each once"),
        ({"family": "acre", "difficulty": 1}, "tasks.difficulty=1: acre has no curriculum; use 0"),
        ({"family": "survo", "difficulty": 9}, "tasks.difficulty=9 cannot be used in survo: max_empty must be <= 9"),
        (
            {"config": {"min_term": 1}},
            "tasks.config.min_term is not a field of chain_sum; its fields are allow_negation",
        ),
        ({"config": {"seed": 1}}, "tasks.config.seed has no meaning; set tasks.seed"),
        ({"config": {"min_terms": 9}}, "tasks.config.min_terms=9 cannot be used in chain_sum: max_terms must be"),
        ({"config": {"min_terms": "two"}}, "tasks.config.min_terms='two' cannot be used in chain_sum"),
        ({"config": {"min_terms": 2.5, "max_terms": 2.5}}, "tasks.config: chain_sum could not make an item"),
        ({"family": ("gcd", "lcm"), "config": {"min_value": 1}}, "tasks.config.min_value is not one of the families"),
        ({"family": ("gcd", "lcm"), "config": {"gcd": 1}}, "tasks.config.gcd=1 is no mapping"),
        ({"family": ("gcd", "lcm"), "config": {"gcd": {"n": 1}}}, "tasks.config.gcd.n is not a field of gcd"),
        ({"template": "{answer}"}, "tasks.template='{answer}' has no place for the question"),
        ({"size": 0}, "tasks.size=0 is too small"),
        ({"difficulty": -1}, "tasks.difficulty=-1 is too small"),
        ({"family": ("gcd", "lcm"), "held_out": 1}, "tasks.held_out=1 leaves a family without items"),
    ],
)
def test_what_no_tasks_can_be_made_of_is_refused_in_one_line(changes: dict, message: str):
    with pytest.raises(DataError) as caught:
        load_tasks(TaskSource(**{"family": "chain_sum", "size": 10, "held_out": 5, **changes}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r'pip install "mmada\[rl\]"'):
        load_tasks(TaskSource("chain_sum"))
