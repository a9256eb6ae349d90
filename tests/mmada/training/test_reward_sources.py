"""Each source of rewards, in order and in all its ways of going wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from mmada.data.tasks import TaskSource, load_tasks
from mmada.errors import DataError
from mmada.presets import build_config
from mmada.reward_model import COMPONENTS, MMaDARewardModel
from mmada.tokenizer import ByteTokenizer
from mmada.training.reward_sources import (
    FunctionReward,
    HTTPReward,
    ModelReward,
    RewardSource,
    TaskReward,
    WeightedReward,
    build_reward,
    check_parts,
)
from mmada.training.rewards import RewardSample

TASKS = load_tasks(TaskSource("chain_sum", size=8, held_out=2))
SAMPLES = [RewardSample(item, f" {item.answer}\n", is_ended=bool(i % 2)) for i, item in enumerate(TASKS.train[:4])]

MODULE = """
seen = []

def length(prompts, completions, **kwargs):
    seen.append(kwargs)
    return [float(len(c.strip())) for c in completions]

def poisoned(completions, **kwargs):
    seen.append(len(completions))
    if any("poison" in c for c in completions):
        raise RuntimeError("cannot read this\\nat all")
    return [1.0] * len(completions)

def single(completions, **kwargs):
    seen.append(len(completions))
    return 1.0

def without_keywords(texts):
    return [0.0] * len(texts)

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of reward functions, importable and never the same twice."""
    name = f"rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


Answer = Callable[[dict], tuple[int, bytes]]


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict], list[Answer]]]:
    """A server on this machine: its URL, the requests it got, and what answers them (the last entry counts)."""
    requests: list[dict] = []
    answers: list[Answer] = [
        lambda body: (200, json.dumps({"rewards": [len(c) for c in body["completions"]]}).encode())
    ]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, text = answers[-1](requests[-1])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score", requests, answers
    server.shutdown()
    server.server_close()


def values(source: RewardSource, samples: list[RewardSample] = SAMPLES) -> list[float | None]:
    return [result.value for result in source.score(samples)]


def test_a_task_scores_by_its_own_scorer():
    wrong = RewardSample(TASKS.train[0], "no idea")
    results = TaskReward(TASKS).score([*SAMPLES, wrong])
    assert [result.value for result in results] == [1, 1, 1, 1, TASKS.score(wrong.item, wrong.completion)]
    assert results[4].value < 0.1 and results[0].seconds > 0


def test_a_scorer_that_raises_fails_its_sample_alone():
    tasks = load_tasks(TaskSource("prime_factorization", size=2, held_out=0))
    item = tasks.train[0]
    good, bad = TaskReward(tasks).score([RewardSample(item, str(item.answer)), RewardSample(item, "no number")])
    assert good.value == 1 and bad.value is None and bad.error.startswith("task: ValueError: invalid literal")


def test_a_function_gets_lists_of_every_column(module: str):
    reward = FunctionReward(f"{module}:length")
    assert values(reward) == [float(len(str(sample.item.answer))) for sample in SAMPLES] and reward.name == "length"
    (seen,) = __import__(module).seen
    assert seen["answer"] == [item.answer for item in TASKS.train[:4]]
    assert seen["entry"][1]["metadata"] == TASKS.train[1].entry["metadata"]
    assert (seen["family"], seen["index"], seen["is_ended"]) == (["chain_sum"] * 4, [0, 1, 2, 3], [False, True] * 2)
    assert set(seen) == {"answer", "family", "entry", "index", "is_ended"}


def test_only_samples_that_raise_by_themselves_fail(module: str):
    samples = [*SAMPLES[:2], RewardSample(TASKS.train[2], "poison"), SAMPLES[3]]
    results = FunctionReward(f"{module}:poisoned").score(samples)
    assert [result.value for result in results] == [1, 1, None, 1]
    assert results[2].error == "poisoned: RuntimeError: cannot read this"
    assert __import__(module).seen == [4, 1, 1, 1, 1]


def test_a_single_number_is_never_spread_over_the_samples(module: str):
    results = FunctionReward(f"{module}:single").score(SAMPLES)
    assert [result.value for result in results] == [None] * 4
    assert "single gave float 1.0 for 4 samples" in results[0].error
    assert __import__(module).seen == [4]  # asking again could only give one number per sample by accident


def test_a_function_without_samples_is_not_called(module: str):
    assert FunctionReward(f"{module}:poisoned").score([]) == [] and __import__(module).seen == []


def test_a_reward_model_says_value_confidence_and_components(tmp_path: Path):
    model = MMaDARewardModel(build_config("debug", num_hidden_layers=1)).eval()
    model.set_normalisation(0.25, 2.0)
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    results = ModelReward(str(tmp_path)).score(SAMPLES)
    prompts, completions = [each.prompt for each in SAMPLES], [each.completion for each in SAMPLES]
    expected = model.score(ByteTokenizer(), prompts, completions)
    for result, output in zip(results, expected, strict=True):
        assert result.value == pytest.approx(output.reward, abs=1e-6)
        assert set(result.components) == {"confidence", *COMPONENTS}
        assert result.components["creativity"] == pytest.approx(output.components["creativity"], abs=1e-6)
    assert len({result.value for result in results}) > 1
    whole = build_reward([{"kind": "model", "name": str(tmp_path)}]).score(SAMPLES)
    assert whole[0].components["model/confidence"] == results[0].components["confidence"]


def test_an_endpoint_gets_lists_and_answers_with_one(endpoint: tuple[str, list[dict], list[Answer]]):
    url, requests, _ = endpoint
    assert values(HTTPReward(url)) == [len(sample.completion) for sample in SAMPLES]
    assert requests[0]["prompts"] == [sample.prompt for sample in SAMPLES] and len(requests) == 1
    assert requests[0]["answer"] == [sample.item.answer for sample in SAMPLES]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"<html>", "no JSON"),
        (b"[1, 2, 3, 4]", 'without "rewards"'),
        (b'{"rewards": [1, 2]}', "gave 2 numbers for 4 samples"),
        (b'{"rewards": 1}', "gave int 1 for 4 samples"),
    ],
)
def test_an_answer_of_another_shape_fails_the_call(endpoint: tuple, text: bytes, message: str):
    url, requests, answers = endpoint
    answers.append(lambda body: (200, text))
    results = HTTPReward(url).score(SAMPLES)
    assert all(result.value is None and message in result.error and url in result.error for result in results)
    assert len(requests) == 1


def test_not_a_number_from_an_endpoint_fails_its_sample(endpoint: tuple):
    url, _, answers = endpoint
    answers.append(lambda body: (200, b'{"rewards": [1, NaN, null, 4]}'))
    assert values(HTTPReward(url)) == [1, None, None, 4]


@pytest.mark.parametrize("status", [500, 422, 204, 302])
def test_another_status_is_asked_again_sample_by_sample(endpoint: tuple, status: int):
    url, requests, answers = endpoint
    answers.append(lambda body: (status if "poison" in "".join(body["completions"]) else 200, b'{"rewards": [7]}'))
    results = HTTPReward(url).score([SAMPLES[0], RewardSample(TASKS.train[1], "poison"), SAMPLES[2]])
    assert [result.value for result in results] == [7, None, 7] and len(requests) == 4
    assert f"answered with status {status}" in results[1].error


def test_an_endpoint_is_asked_again_where_it_fails_by_itself(endpoint: tuple):
    url, requests, answers = endpoint

    def troubled(body: dict) -> tuple[int, bytes]:
        return (503, b"busy") if len(requests) < 3 else (200, b'{"rewards": [1, 2, 3, 4]}')

    answers.append(troubled)
    assert values(HTTPReward(url, retries=2)) == [1, 2, 3, 4] and len(requests) == 3


def test_an_endpoint_that_is_late_or_not_there_fails_the_call_once(endpoint: tuple):
    url, requests, answers = endpoint
    leave = Event()
    answers.append(lambda body: (200 if leave.wait(20) else 200, b"{}"))
    began = time.monotonic()
    late = HTTPReward(url, timeout=0.3).score(SAMPLES)
    leave.set()
    assert all("gave no answer" in result.error and "timed out" in result.error for result in late)
    assert len(requests) == 1 and sum(result.seconds for result in late) == pytest.approx(
        time.monotonic() - began, abs=1
    )
    gone = HTTPReward("http://127.0.0.1:9/score").score(SAMPLES)
    assert all("gave no answer" in result.error for result in gone)


def test_parts_are_weighted_summed_and_named(module: str):
    parts = [
        {"kind": "task"},
        {"kind": "function", "name": f"{module}:length", "weight": -0.5},
        {"kind": "function", "name": f"{module}:length", "weight": 2.0},
    ]
    results = build_reward(parts, TASKS).score(SAMPLES)
    for result, sample in zip(results, SAMPLES, strict=True):
        length = len(str(sample.item.answer))
        assert result.value == pytest.approx(1 + 1.5 * length)
        assert result.components == {"task": 1, "length": length, "length#2": length}
        assert result.seconds > 0


def test_solved_is_one_for_full_marks_and_else_nothing():
    tasks = load_tasks(TaskSource("spell_backward", size=2, held_out=0, config={"min_word_len": 4, "max_word_len": 4}))
    item = tasks.train[0]
    answer = str(item.answer)
    samples = [RewardSample(item, answer), RewardSample(item, answer[:3] + "?"), RewardSample(item, "")]
    partly, solved = (build_reward([{"kind": kind}], tasks).score(samples) for kind in ("task", "solved"))
    assert 0 < partly[1].value < 1
    assert [result.value for result in solved] == [1, 0, 0]
    assert solved[0].components == {"solved": 1}


def test_a_sample_that_one_part_cannot_score_has_no_reward(module: str):
    samples = [SAMPLES[0], RewardSample(TASKS.train[1], "poison")]
    good, bad = WeightedReward([(TaskReward(TASKS), 1.0), (FunctionReward(f"{module}:poisoned"), 0.0)]).score(samples)
    assert good.value == 1 and bad.value is None and bad.error == "poisoned: RuntimeError: cannot read this"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "oracle"}, "kind=oracle is unknown"),
        ({"kind": "task", "name": "x"}, "name=x has no meaning"),
        ({"kind": "solved", "name": "x"}, "name=x has no meaning with kind: solved"),
        ({"kind": "task", "weight": float("nan")}, "weight=nan is not finite"),
        ({"kind": "function"}, "name is missing; give module:function"),
        ({"kind": "function", "name": "length"}, "names no function; write module:function"),
        ({"kind": "function", "name": "no_such_module:f"}, "no_such_module cannot be imported"),
        ({"kind": "function", "name": "{module}:nothing"}, "has no nothing"),
        ({"kind": "function", "name": "{module}:constant"}, "is a int, which cannot be called"),
        ({"kind": "function", "name": "{module}:without_keywords"}, "cannot be called with the keywords prompts"),
        ({"kind": "model", "name": "/nowhere"}, "no folder with a saved reward model"),
        ({"kind": "http", "name": "localhost:80"}, "is no URL"),
    ],
)
def test_a_part_that_cannot_be_is_refused_by_name(module: str, part: dict, message: str):
    named = {key: value.format(module=module) if key == "name" else value for key, value in part.items()}
    with pytest.raises(DataError, match=r"reward\.parts\[1\]") as caught:
        check_parts([{"kind": "task"}, named])
    assert message in str(caught.value)


def test_a_module_that_cannot_be_read_is_refused_with_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_rewards.py").write_text("raise KeyError('gone')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="broken_rewards cannot be imported .KeyError: 'gone'"):
        check_parts([{"kind": "function", "name": "broken_rewards:f"}])


def test_a_task_part_needs_tasks_and_a_reward_needs_parts():
    with pytest.raises(DataError, match="add the section tasks"):
        build_reward([{"kind": "task"}])
    with pytest.raises(DataError, match=r"reward\.parts is empty"):
        check_parts([])


def test_a_folder_that_holds_no_reward_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"reward\.parts\[0\]\.name=.* no reward model could be loaded"):
        build_reward([{"kind": "model", "name": str(tmp_path)}])
