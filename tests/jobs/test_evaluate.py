"""``mmada evaluate``: the figures are those of training, on whatever was held out, and can be had of any checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.evaluation_tasks import held_out_accuracy
from jobs.recipe import load_recipe
from mmada.data import load_tokenizer, prepare
from mmada.data.tasks import TaskSource, load_tasks
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import MMaDARewardModel
from tests.jobs.workers import run_together

TOKENIZER = load_tokenizer("bytes")
SUMS = TaskSource("chain_sum", size=20, held_out=12, config={"min_terms": 2, "max_terms": 2, "max_digits": 1})
RUNS = {  # name: keys; one worker trains each for two steps
    "sums": [
        "data.source=tasks",
        "tasks.family=chain_sum",
        "tasks.config={min_terms: 2, max_terms: 2, max_digits: 1}",
        "tasks.size=20",
        "tasks.held_out=12",
    ],
    "pairs": ["data.source=tasks", "tasks.family=spell_backward", "tasks.size=20", "tasks.held_out=10"],
    "text": ["data.limit_documents=40"],
}


def train_all(rank: int, folder: Path) -> dict[str, dict[str, float]]:
    """Two steps of every run, the resolved recipe in its folder; the metrics of the last step."""
    from jobs.prepared_data import cache_dir, text_source
    from jobs.recipe import RESOLVED_RECIPE
    from jobs.worker import TrainingWorker

    found = {}
    for name, keys in RUNS.items():
        fixed = ["train.steps=2", "train.warmup_steps=0", "train.global_batch=4", "train.zero_stage=1"]
        fixed += ["cluster.workers=1", "cluster.expert_parallel=1", f"run.dir={folder}", f"run.name={name}"]
        if name != "text":
            fixed += ["data.limit_documents=null"]
        objective = ["train.objective=reward"] if name == "pairs" else []
        recipe = load_recipe("debug", [*fixed, *keys, *objective])
        run_dir, prepared = folder / name, None
        (run_dir / "logs").mkdir(parents=True)
        (run_dir / RESOLVED_RECIPE).write_text(recipe.resolved_yaml())
        if name == "text":
            prepared = prepare(text_source(recipe), TOKENIZER, cache_dir(recipe), held_out=recipe.data.held_out).folder
        history: list[dict[str, float]] = []
        report = lambda message, history=history: history.extend(message.get("history", []))  # noqa: E731
        TrainingWorker(recipe, run_dir, prepared, torch.device("cpu"), report).run()
        found[name] = history[-1]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the runs, and each one's last metrics."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_together(1, train_all, folder)[0]


def evaluated(folder: Path, monkeypatch, capsys, *arguments: str) -> tuple[dict, str]:
    """What the verb writes as JSON, and what it prints."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *arguments, "--json", "found.json"])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    return json.loads((folder / "found.json").read_text()), out


def test_problems_that_were_learned_from_are_left_out(trained, monkeypatch, capsys):
    folder, _ = trained
    found, out = evaluated(folder, monkeypatch, capsys, "sums", "tasks.held_out=20")
    assert found["accuracy"]["count"] == 12
    assert "12 held-out problems (8 more were learned from and are left out)" in out
    learned = {item.prompt for item in load_tasks(SUMS).train}
    assert all(answer["prompt"] not in learned for answer in found["answers"])


def test_problems_are_solved_as_often_as_training_said(trained, monkeypatch, capsys):
    folder, metrics = trained
    found, out = evaluated(folder, monkeypatch, capsys, "sums", "--show", "1")
    assert found["kind"] == "tasks" and found["accuracy"]["count"] == 12
    assert found["accuracy"]["mean"] == metrics["sums"]["held_out_accuracy"]
    assert found["accuracy"]["low"] <= found["accuracy"]["mean"] <= found["accuracy"]["high"] < 0.9
    assert list(found["families"]) == ["chain_sum"] and len(found["answers"]) == 12
    tasks = load_tasks(SUMS)
    for answer, item in zip(found["answers"], tasks.held_out, strict=True):
        assert (answer["prompt"], answer["answer"]) == (item.prompt, item.answer)
        assert answer["scores"] == [tasks.score(item, text) for text in answer["texts"]]
    assert "12 held-out problems, greedy" in out and repr(tasks.held_out[0].prompt) in out and "chain_sum" in out


def test_an_exported_model_is_asked_what_the_command_line_says(trained, monkeypatch, capsys):
    folder, _ = trained
    shutil.copytree(next((folder / "sums" / "checkpoints").glob("step-*")) / "model", folder / "exported")
    keys = ["tasks.family=[chain_sum, spell_backward]", "tasks.held_out=6", "tasks.size=10"]
    found, out = evaluated(
        folder, monkeypatch, capsys, "exported", *keys, "--samples", "3", "--temperature", "1", "--max-new-tokens", "4"
    )
    assert list(found["families"]) == ["chain_sum", "spell_backward"] and "\n all" in out
    assert all(len(answer["texts"]) == 3 for answer in found["answers"])
    assert "temperature 1, 3 samples each, at most 4 new tokens" in out
    again, _ = evaluated(
        folder, monkeypatch, capsys, "exported", *keys, "--samples", "3", "--temperature", "1", "--max-new-tokens", "4"
    )
    assert again["answers"] == found["answers"]


def test_text_needs_the_bits_that_training_said(trained, monkeypatch, capsys):
    folder, metrics = trained
    found, out = evaluated(folder, monkeypatch, capsys, "text")
    assert found["bits_per_byte"] == pytest.approx(metrics["text"]["bits_per_byte"], rel=1e-5)
    assert "bits per held-out byte" in out
    assert found["scaled_calibration_error"] != found["held_out_calibration_error"] > 0
    error, temperature = f"{found['held_out_calibration_error']:.2%}", f"{found['temperature']:.3f}"
    assert f"calibration error {error}" in out and f"at temperature {temperature}" in out


def test_a_reward_model_orders_the_pairs_that_training_said(trained, monkeypatch, capsys):
    folder, metrics = trained
    found, out = evaluated(folder, monkeypatch, capsys, "pairs/checkpoints/step-00000002")
    names = [name for name in metrics["pairs"] if name.startswith("pair_accuracy") or name.endswith("_correlation")]
    assert len(names) >= 9 and "confidence_brier" in found
    for name in names:
        assert found[name] == pytest.approx(metrics["pairs"][name], abs=1e-4), name
    assert "pair accuracy" in out


def test_a_reward_model_is_exported_and_not_sampled(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "pairs", "a"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "holds a reward model" in err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "pairs", "mine"])
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out
    assert MMaDARewardModel.from_pretrained(folder / "mine").heads.reward_std != 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "checkpoint=nowhere is not a folder"),
        (["alone"], "lies in no run whose recipe says what was held out"),
        (["sums", "train.steps=5"], "override=train.steps=5 changes nothing in an evaluation"),
        (["sums", "--samples", "2"], "--samples=2 are all the same at --temperature=0"),
        (["sums", "tasks.held_outs=2"], "tasks.held_outs=2 is not a key of a recipe"),
        (["sums", "--max-new-tokens", "5000"], "--max-new-tokens=5000 cannot be sampled"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(trained, monkeypatch, capsys, arguments, said):
    folder, _ = trained
    if not (folder / "alone").exists():
        shutil.copytree(folder / "sums" / "checkpoints" / "step-00000002" / "model", folder / "alone")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and said in err


# The function behind it.


@pytest.fixture(scope="module")
def oracle() -> MMaDAForCausalLM:
    """A model that was shown the answers until it knew them."""
    from jobs.objectives.tasks import TaskRows
    from mmada.presets import build_config

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = MMaDAForCausalLM(build_config("debug", num_experts=0, mlp_layer_types="dense")).train()
    rows = TaskRows(load_tasks(SUMS).held_out, TOKENIZER, 96)
    batch = rows.batch(range(12))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.05:
            break
    torch.set_num_threads(threads)
    return model.eval()


def test_a_model_that_knows_the_answers_solves_all(oracle):
    tasks = load_tasks(SUMS)
    found = held_out_accuracy(oracle, TOKENIZER, tasks, max_new_tokens=4)
    assert found.accuracy.mean == found.score.mean == 1.0 and found.accuracy.low < 1
    assert all(answer.ended == [True] and answer.texts == [answer.item.answer] for answer in found.answers)
    assert found.new_tokens == sum(len(answer.texts[0]) + 1 for answer in found.answers)
    wrong = held_out_accuracy(oracle, TOKENIZER, tasks, max_new_tokens=4, items=tasks.train)
    assert wrong.accuracy.mean < 1 and len(wrong.answers) == 20


def test_samples_are_a_function_of_the_seed_and_not_of_their_neighbours(oracle):
    tasks = load_tasks(SUMS)
    ask = {"max_new_tokens": 4, "temperature": 2.0, "samples": 3}
    texts = [answer.texts for answer in held_out_accuracy(oracle, TOKENIZER, tasks, seed=1, **ask).answers]
    some = held_out_accuracy(oracle, TOKENIZER, tasks, seed=1, slots=2, items=tasks.held_out[5:8], **ask)
    assert [answer.texts for answer in some.answers] == texts[5:8]
    other = [answer.texts for answer in held_out_accuracy(oracle, TOKENIZER, tasks, seed=2, **ask).answers]
    assert other != texts


def test_texts_that_a_scorer_cannot_take_count_as_wrong():
    class Raising:
        def score(self, item, text):
            if text == "x":
                raise ZeroDivisionError("no answer at all")
            return 1.0

    from jobs.evaluation_tasks import scored
    from mmada.generate import Completion

    item = load_tasks(SUMS).held_out[0]
    completions = [Completion(ids=[8 + ord(text)], finish="length") for text in "xy"]
    answer = scored(Raising(), TOKENIZER, item, completions)  # type: ignore[arg-type]
    assert answer.scores == [0.0, 1.0] and answer.refusals == ["ZeroDivisionError: no answer at all"]
    assert answer.accuracy == 0.5 and answer.ended == [False, False]
