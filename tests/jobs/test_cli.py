"""The command line: exit codes, what it prints, and one clear line for every mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cli

ROOT = Path(__file__).parents[2]
RECIPE = "run: {name: wrong}\nmodel: {preset: debug}\ntrain: {steps: 10}\n"


def outcome(argv: list[str], capsys: pytest.CaptureFixture[str]) -> SimpleNamespace:
    """Run a command line in this process: exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as exited:
        cli.main(argv)
    captured = capsys.readouterr()
    return SimpleNamespace(code=exited.value.code, out=captured.out, err=captured.err)


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


def assert_refused(code: int | None, err: str, words: list[str]) -> None:
    """Exit code 2 and one line on stderr that holds all the words: field, value and remedy."""
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("mmada: "), err
    missing = [word for word in words if word not in err]
    assert not missing, f"{missing} not in {err!r}"


# Each row: overrides after a small recipe, and what the line must name: field and value, then the remedy.
WRONG_RECIPES = [
    # keys that do not exist
    (["train.step=5"], ["train.step=5", "did you mean train.steps?"]),
    (["trian.steps=5"], ["trian=", "did you mean train?"]),
    (["train.seed=1"], ["train.seed=1", "did you mean run.seed?"]),
    (["cluster.gpus=2"], ["cluster.gpus=2", "use cluster.address"]),
    (["model.hiden_size=32"], ["model.hiden_size=32", "did you mean model.hidden_size?"]),
    (["model.preset=tinny"], ["model.preset='tinny'", "did you mean tiny?"]),
    # types
    (["train.steps=many"], ["train.steps='many'", "write a whole number without quotes"]),
    (["train.steps='5'"], ["train.steps='5'", "write a whole number without quotes"]),
    (["train.steps=true"], ["train.steps=true", "write a whole number"]),
    (["train.steps=2.5"], ["train.steps=2.5", "write a whole number"]),
    (["train.learning_rate=fast"], ["train.learning_rate='fast'", "write a number"]),
    (["run.resume=yes"], ["run.resume='yes'", "write true or false"]),
    (["run.name=7"], ["run.name=7", "quote it"]),
    (["train=5"], ["override=train=5", "write section.key=5"]),
    (["cluster.workers=[2]"], ["cluster.workers=[2]", "write a whole number"]),
    (["model.num_experts=four"], ["model.num_experts='four'", "write a whole number"]),
    (["model.router_noise=1"], ["model.router_noise=1", "write true or false"]),
    (["model.rope_parameters=5"], ["model.rope_parameters=5", "write "]),
    (["model.rope_parameters={rope_type: linear}"], ["model.rope_parameters.rope_type=linear", "factor; add it"]),
    # ranges
    (["train.steps=-5"], ["train.steps=-5", "use at least 1"]),
    (["train.zero_stage=4"], ["train.zero_stage=4", "use 0 to 3"]),
    (["train.learning_rate=0"], ["train.learning_rate=0", "use more than 0"]),
    (["train.learning_rate=.inf"], ["train.learning_rate=inf", "write a finite number"]),
    (["data.held_out=1.5"], ["data.held_out=1.5", "use more than 0 and at most 0.5"]),
    (["cluster.workers=0"], ["cluster.workers=0", "use at least 1"]),
    (["cluster.gpus_per_worker=2"], ["cluster.gpus_per_worker=2", "use 0 to 1"]),
    (["run.seed=-1"], ["run.seed=-1", "use at least 0 and less than"]),
    (["train.beta2=1.0"], ["train.beta2=1.0", "use at least 0 and less than 1"]),
    (["train.precision=fp8"], ["train.precision='fp8'", "use fp32 or bf16"]),
    (["model.attn_implementation=flash"], ["model.attn_implementation='flash'", "use sdpa, eager, blockwise or flex"]),
    (["run.name=a/b"], ["run.name='a/b'", "use letters, digits"]),
    (["run.name=.."], ["run.name='..'", "use letters, digits"]),
    (["run.name="], ["run.name=null", "write text"]),
    (["tracking.uri=''"], ["tracking.uri=''", "leave the key out"]),
    # what does not go together
    (["train.global_batch=9", "cluster.workers=2"], ["train.global_batch=9", "cluster.workers=2", "use 8 or 10"]),
    (["train.global_batch=1", "cluster.workers=2"], ["train.global_batch=1", "use 2"]),
    (["train.global_batch=8", "train.micro_batch=3"], ["train.micro_batch=3", "use 1, 2, 4 or 8"]),
    (["train.warmup_steps=10"], ["train.warmup_steps=10", "train.steps=10", "use at most 9"]),
    (["train.sequence_length=2000"], ["train.sequence_length=2000", "use at most 1024"]),
    (
        ["train.offload_optimizer=true", "train.zero_stage=0"],
        ["train.offload_optimizer=true", "train.zero_stage=0", "use train.zero_stage=1, 2 or 3"],
    ),
    (
        ["cluster.workers=3", "cluster.expert_parallel=2", "train.global_batch=3"],
        ["cluster.expert_parallel=2", "cluster.workers=3", "use 1 or 3"],
    ),
    (
        ["cluster.workers=4", "cluster.expert_parallel=4", "model.num_experts=6"],
        ["model.num_experts=6", "cluster.expert_parallel=1 or 2", "model.num_experts=4, 8, 12"],
    ),
    (
        ["cluster.workers=2", "cluster.expert_parallel=2", "model.num_experts=0"],
        ["cluster.expert_parallel=2", "model.num_experts=0", "use cluster.expert_parallel=1"],
    ),
    (
        ["cluster.workers=2", "cluster.expert_parallel=2", "train.zero_stage=0"],
        ["train.zero_stage=0", "cluster.expert_parallel=2", "use train.zero_stage=1, 2 or 3"],
    ),
    (["model.num_key_value_heads=3"], ["model.num_key_value_heads=3", "use one of [1, 2, 4]"]),
    (["model.num_experts_per_tok=5"], ["model.num_experts_per_tok=5", "use at most 4"]),
    (["model.hidden_size=-64", "model.head_dim=16"], ["model.hidden_size=-64", "use 1 or more"]),
    (["model.vocab_size=100"], ["model.vocab_size=100", "264 tokens", "use model.vocab_size=264 or more"]),
    (["model.mlp_layer_types=[dense]"], ["model.mlp_layer_types", "1 entries", "give one per layer"]),
    (
        ["cluster.gpus_per_worker=1", "cluster.workers=32"],
        ["cluster.gpus_per_worker=1", "cluster.workers=32", "use cluster.gpus_per_worker=0"],
    ),
    # data
    (["data.source=files"], ["data.path=null", "data.source=files", "set it to"]),
    (["data.source=files", "data.path=/no/such/file.txt"], ["data.path=/no/such/file.txt", "give a text"]),
    (["data.path=/tmp"], ["data.path='/tmp'", "data.source=stdlib", "use data.source=files"]),
    (["data.source=web"], ["data.source='web'", "use stdlib, files, hub, tasks or mixture"]),
    (["data.tokenizer=./no-such-tokenizer"], ["data.tokenizer=./no-such-tokenizer", "give a tokenizer's folder"]),
    # a run's folder
    (["run.resume=true"], ["run.resume=true", "runs/wrong", "leave it out"]),
    (["run.dir=recipe.yaml"], ["run.dir=recipe.yaml", "give another folder"]),
    (["run.dir=~nobody-of-this-name/x"], ["run.dir=~nobody-of-this-name/x", "give another folder"]),
    (["model.pad_token_id=500"], ["model.pad_token_id=500", "vocab_size=264"]),
    (["model.rms_norm_eps=-1.0"], ["model.rms_norm_eps=-1.0", "is not positive"]),
    # overrides that are none
    (["train.steps"], ["override=train.steps", "write section.key=value"]),
    (["steps=5"], ["override=steps=5", "write train.steps=5"]),
    (["train.steps=[1"], ["override=train.steps=[1", "mend it there"]),
    (["train.steps.more=5"], ["train.steps=10 holds no keys", "set train.steps itself"]),
    (["model.ssm.state_sice=5"], ["model.ssm.state_sice=5 is not a field", "did you mean model.ssm.state_size?"]),
    (["model.ssm=5"], ["model.ssm=5 is not a section", "write its keys below it"]),
    (["model.ssm.chunk_size=3.5"], ["model.ssm.chunk_size=3.5", "write a whole number"]),
    (["model.patches.threshold=high"], ["model.patches.threshold='high'", "write a number"]),
    (["model.patches.hash_sizes=3"], ["model.patches.hash_sizes=3", "write a list of whole numbers"]),
    (["model.memory.momentum=yes"], ["model.memory.momentum='yes'", "write true or false"]),
    (["model.mixer_types=[ssm, 3]"], ["model.mixer_types=['ssm', 3]", "write text or a list such as [ssm, attention]"]),
    (["model.window_sizes=8"], ["model.window_sizes=8", "write a list of whole numbers"]),
    (["model.rope_parameters=linear"], ["model.rope_parameters='linear'", "write a section such as"]),
    (["model.attn_implementation=flex_attention"], ["implementation=flex_attention", "use sdpa or blockwise"]),
    (["model.mixer_types=ssm", "model.ssm.state_size=0"], ["model.ssm.state_size=0", "use 1 or more"]),
    (["model.mixer_types=[ssm, atention]"], ["model.mixer_types holds 'atention'", "use 'attention'"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), WRONG_RECIPES, ids=lambda value: " ".join(value[:3])[:60])
def test_a_wrong_recipe_is_refused_in_one_line(
    overrides: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = outcome(["train", "recipe.yaml", *overrides], capsys)
    assert_refused(result.code, result.err, words)
    assert result.out == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


WRONG_COMMANDS = [
    (["trian", "debug"], ["verb=trian", "did you mean train?"]),
    (["fly"], ["verb=fly", "use train, ppo, tune"]),
    (["train"], ["RECIPE is missing", "see mmada train --help"]),
    (["train", "debgu"], ["recipe=debgu", "did you mean debug?"]),
    (["train", "no/such.yaml"], ["recipe=no/such.yaml", "give a YAML file, or backbone-all"]),
    (["train", "."], ["recipe=.", "is a folder", "give a YAML file"]),
    (["train", "debug", "--steps=5"], ["argument=--steps=5", "see mmada train --help"]),
    (["plan", "debug", "train.zero_stage=9"], ["train.zero_stage=9", "use 0 to 3"]),
    (
        ["plan", "debug", "model.num_experts=5"],
        ["model.num_experts=5", "is not divisible by cluster.expert_parallel=2"],
    ),
    (["export", "no/such"], ["DIR is missing", "see mmada export --help"]),
    (["export", "no/such", "out"], ["checkpoint=no/such", "give a checkpoint"]),
    (["generate", "no/such"], ["PROMPT is missing", "see mmada generate --help"]),
    (["generate", "no/such", "Once"], ["checkpoint=no/such", "give a checkpoint"]),
    (["generate", "x", "y", "--temperature", "-1"], ["--temperature", "-1", "use 0 or more"]),
    (["generate", "x", "y", "--temperature", "nan"], ["--temperature", "nan", "use 0 or more"]),
    (["generate", "x", "y", "--top-p", "1.5"], ["--top-p", "1.5", "use 1 for no cut"]),
    (["generate", "x", "y", "--max-new-tokens", "0"], ["--max-new-tokens", "0", "use 1 or more"]),
    (["generate", "x", "y", "--max-new-tokens", "ten"], ["--max-new-tokens", "ten", "use 1 or more"]),
    (["bench", "nothing-of-the-kind"], ["name=nothing-of-the-kind", "use "]),
    (["doctor", "--depth"], ["argument=--depth", "see mmada doctor --help"]),
]


@pytest.mark.parametrize(("argv", "words"), WRONG_COMMANDS, ids=lambda value: " ".join(value)[:60])
def test_a_wrong_command_is_refused_in_one_line(
    argv: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    result = outcome(argv, capsys)
    assert_refused(result.code, result.err, words)
    assert result.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no sections", "write run, model"]),
        ("- a\n- b\n", ["holds no sections"]),
        ("run: [", ["is no valid YAML", "line 1, column 7"]),
        ("run: {name: a, name: b}", ["name stands there twice"]),
        ("train: {steps: 5}\nmodel: {preset: debug}\n", ["run is missing", "needs a section run"]),
        ("run: {name: a}\nmodel: {preset: debug}\ntrain: {}\n", ["train.steps is missing", "train.steps=…"]),
        ("run: {name: a}\nmodel: debug\ntrain: {steps: 5}\n", ["model='debug'", "write its keys below it"]),
        (b"\xff\xfe\x00", ["cannot be read", "give a YAML file"]),
    ],
    ids=["empty", "list", "broken", "twice", "no section", "no key", "text for a section", "no text"],
)
def test_a_wrong_file_is_refused_in_one_line(
    content: str | bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = outcome(["train", str(path)], capsys)
    assert_refused(result.code, result.err, words)


def test_a_used_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "debug" / "checkpoints").mkdir(parents=True)
    result = outcome(["train", "debug", f"run.dir={tmp_path}"], capsys)
    assert_refused(result.code, result.err, ["run.name=debug", "run.resume=true", "choose another run.name"])


def test_data_without_text_is_refused_before_a_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    result = outcome(["train", "debug", "data.source=files", "data.path=empty.txt", "run.dir=out"], capsys)
    assert_refused(result.code, result.err, ["data.path=empty.txt", "give"])
    assert not (tmp_path / "out" / "debug").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "debug", "train.zero_stage=4"], ["train.zero_stage=4", "use 0 to 3"]),
        (["plan", "debug", "model.hidden_size=30"], ["model.num_attention_heads=4", "model.hidden_size=30"]),
        (["paln", "debug"], ["verb=paln", "did you mean plan?"]),
        (["bench", "moe", "--no-such-option"], ["--no-such-option", "see mmada bench moe --help"]),
        (["train", "debug", "cluster.address=127.0.0.1:9"], ["cluster.address=127.0.0.1:9", "does not answer"]),
        (["train", "debug", "tracking.uri=http://127.0.0.1:9"], ["tracking.uri=http://127.0.0.1:9"]),
    ],
    ids=lambda value: value[-1],
)
def test_a_mistake_in_a_process_of_its_own(arguments: list[str], words: list[str], tmp_path: Path):
    done = command(*arguments, cwd=tmp_path)
    assert_refused(done.returncode, done.stderr, words)
    # Prepared text is kept for the next try; a run's folder is not left behind.
    assert [path for path in tmp_path.rglob("*") if ".data" not in path.parts and path.name != "runs"] == []


def test_without_a_verb_it_explains_itself(capsys: pytest.CaptureFixture[str]):
    result = outcome([], capsys)
    assert result.code == 0 and result.err == ""
    assert all(f"\n    {verb} " in result.out for verb in cli.VERBS)


def test_help_lists_the_verbs_there_are(capsys: pytest.CaptureFixture[str]):
    for verb in cli.VERBS:
        result = outcome([verb, "--help"], capsys)
        assert result.code == 0 and result.out.startswith(f"usage: mmada {verb}")


@pytest.mark.parametrize(
    ("verb", "arguments", "call"),
    [
        ("train", ["r.yaml", "a.b=1", "c.d=2"], {"recipe": "r.yaml", "overrides": ["a.b=1", "c.d=2"]}),
        ("plan", ["r.yaml"], {"recipe": "r.yaml", "overrides": []}),
        ("export", ["c", "d"], {"checkpoint": "c", "directory": "d"}),
        (
            "generate",
            ["c", "Once upon", "--max-new-tokens", "5", "--temperature", "0", "--seed", "3"],
            {"prompt": "Once upon", "max_new_tokens": 5, "temperature": 0.0, "top_p": 0.95, "seed": 3},
        ),
        ("bench", ["moe", "--shapes", "3", "fast"], {"name": "moe", "rest": ["--shapes", "3", "fast"]}),
        ("bench", ["moe", "--help"], {"name": "moe", "rest": ["--help"]}),
        ("doctor", ["--deep"], {"deep": True}),
    ],
)
def test_a_verb_gets_its_arguments_and_its_code_is_the_exit_code(
    verb: str,
    arguments: list[str],
    call: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    seen: list[dict[str, object]] = []

    def record(options: object) -> int:
        seen.append(vars(options))
        return 1

    monkeypatch.setitem(cli.VERBS, verb, record)
    assert outcome([verb, *arguments], capsys).code == 1
    assert seen and call.items() <= seen[0].items()


def raising(error: BaseException) -> Callable[[object], int]:
    def verb(options: object) -> int:
        raise error

    return verb


def test_interrupted_it_leaves_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(cli.VERBS, "doctor", raising(KeyboardInterrupt()))
    result = outcome(["doctor"], capsys)
    assert (result.code, result.out, result.err) == (130, "", "")


def test_the_errors_of_all_three_floors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from cluster.errors import ClusterError
    from jobs.recipe import RecipeError
    from mmada.errors import DataError

    for error in (
        ClusterError("a=1 is\nwrong; use 2"),
        RecipeError("a=1 is wrong; use 2"),
        DataError("a=1 is wrong; use 2"),
    ):
        monkeypatch.setitem(cli.VERBS, "doctor", raising(error))
        result = outcome(["doctor"], capsys)
        assert (result.code, result.err) == (2, "mmada: a=1 is wrong; use 2\n")


def test_an_error_of_ours_is_not_taken_for_the_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.VERBS, "doctor", raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["doctor"])


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = f"{sys.executable} -u -m jobs.cli --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")
