"""Recipes: what is read, what is refused, and in which words."""

from pathlib import Path
from typing import get_args

import pytest

from jobs import recipe_yaml
from jobs.recipe import RecipeError, load_recipe, shipped_recipes
from jobs.recipe_checks import check, check_run, checked_config, divisors
from jobs.recipe_schema import Recipe, Section
from jobs.wording import listed, shown, suggestion

SMALLEST = "run: {name: one}\nmodel: {preset: debug}\ntrain: {steps: 10}\n"


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """The shortest recipe that is complete."""
    path = tmp_path / "smallest.yaml"
    path.write_text(SMALLEST)
    return path


def with_run_dir(recipe: str | Path, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe, [f"run.dir={folder}", *overrides])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_and_goes_together(name: str):
    check(load_recipe(name))


def test_every_recipe_in_the_repository_is_a_shipped_one():
    root = Path(__file__).parents[2]
    found = {path for path in root.glob("*/**/*.yaml") if "recipes" in path.parts and ".venv" not in path.parts}
    assert found == set(shipped_recipes().values())
    assert {"quickstart", "debug"} <= set(shipped_recipes())


def test_debug_recipe_is_the_smallest_run_that_exercises_everything():
    recipe = load_recipe("debug")
    asked = (recipe.cluster.workers, recipe.train.zero_stage, recipe.cluster.expert_parallel, recipe.train.steps)
    assert asked == (2, 2, 2, 20)
    assert recipe.train.checkpoint_every == 10
    assert checked_config(recipe).num_experts == 4


def test_overrides_are_yaml_and_the_last_one_counts(smallest: Path):
    overrides = [
        "train.steps=5",
        "train.steps=7",
        "train.learning_rate=1e-3",
        "run.resume=true",
        "cluster.address=127.0.0.1:6379",
        "tracking.uri=",
        "model.mlp_layer_types=[moe, dense]",
        "run.name=2024-05-01",
    ]
    recipe = load_recipe(smallest, overrides)
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.run.resume) == (7, 0.001, True)
    assert (recipe.cluster.address, recipe.tracking.uri) == ("127.0.0.1:6379", None)
    assert recipe.run.name == "2024-05-01"
    assert recipe.model.overrides() == {"attn_implementation": "sdpa", "mlp_layer_types": ["moe", "dense"]}


def test_overrides_reach_into_sources_stages_and_entries_of_lists():
    recipe = load_recipe(
        "stages",
        [
            "data.sources.sums.tasks.size=77",
            "data.sources.more={source: stdlib}",
            "data.sources.more.limit_documents=5",
            "train.stages.sums.steps=9",
            "train.stages.sums.mixture.text=0.5",
            "train.stages.2.name=last",
            "objectives.weights.calibration=0.25",
        ],
    )
    sources, stages = recipe.data.sources, recipe.train.stages
    assert sources is not None and stages is not None and recipe.objectives is not None
    assert (sources["sums"].tasks.size, sources["sums"].tasks.held_out) == (77, 60)  # what is beside it stays
    assert sources["more"].limit_documents == 5
    assert [stage.name for stage in stages] == ["text", "sums", "last"]
    assert (stages[1].steps, stages[1].mixture) == (9, {"text": 0.5, "sums": 3.0})
    assert recipe.objectives.weights == {"calibration": 0.25}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stages.sum.steps=9", "train.stages.sum is no entry of train.stages; did you mean sums?"),
        ("train.stages.3.steps=9", "train.stages.3 is no entry of train.stages; use text, sums or both"),
        ("train.stages.sums.stepz=9", "train.stages.1.stepz=9 is not a key"),
        ("train.steps.more=9", "train.steps={'more': 9} is not a whole number"),
        ("data.source.more=9", "data.source='mixture' holds no keys; set data.source itself"),
    ],
)
def test_overrides_that_reach_for_what_is_not_there(override: str, said: str):
    with pytest.raises(RecipeError) as refused:
        load_recipe("stages", [override])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_resolved_recipe_reads_back_the_same(smallest: Path, tmp_path: Path):
    awkward = ["run.name='1e3'", "tracking.experiment='on'", "data.text_field='null'", "train.epsilon=1e-8"]
    recipe = load_recipe(smallest, [*awkward, "model.rope_parameters={rope_type: default, rope_theta: 1e6}"])
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe.resolved_yaml())
    assert load_recipe(saved) == recipe
    assert recipe.run.name == "1e3" and recipe.train.epsilon == 1e-8


def test_flattened_has_every_key_under_its_section(smallest: Path):
    flat = load_recipe(smallest, ["model.num_experts=8"]).flattened()
    assert flat["run.name"] == "one" and flat["model.num_experts"] == 8 and flat["cluster.workers"] == 1
    assert len(flat) == sum(len(keys) for keys in load_recipe(smallest).sections().values()) + 1


def test_the_parts_of_a_batch(smallest: Path):
    recipe = load_recipe(smallest, ["train.global_batch=24", "cluster.workers=2", "train.micro_batch=3"])
    assert (recipe.rows_per_worker, recipe.micro_batch, recipe.accumulation) == (12, 3, 4)
    assert load_recipe(smallest, ["train.global_batch=24", "cluster.workers=2"]).accumulation == 1


def test_every_key_has_its_meaning_under_it():
    """The schema is the reference of the keys: each field is followed by a docstring."""
    import ast
    import inspect

    from jobs import recipe_schema, recipe_schema_rl, recipe_schema_stages

    schemas = (recipe_schema, recipe_schema_rl, recipe_schema_stages)
    modules = [ast.parse(inspect.getsource(module)) for module in schemas]
    for node in [node for module in modules for node in module.body]:
        is_section = isinstance(node, ast.ClassDef) and node.name.endswith("Section")
        for field, after in zip(node.body, node.body[1:], strict=False) if is_section else ():
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)}"
    kinds = {name: get_args(field.annotation) or (field.annotation,) for name, field in Recipe.model_fields.items()}
    assert all(issubclass(kinds[name][0], Section) for name in kinds)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5.", 5.0),
        (".5", 0.5),
        ("010", 10),
        ("-3", -3),
        ("1_000", "1_000"),
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'5'", "5"),
    ],
)
def test_yaml_is_read_by_the_core_types_of_version_1_2(text: str, value: object):
    read = recipe_yaml.parse(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("value", ["1e3", "on", "null", "", "5", "a: b", "2024-05-01", 1e-8, 10, True, None, [1, "x"]])
def test_yaml_is_written_so_that_it_reads_back(value: object):
    assert recipe_yaml.parse(recipe_yaml.dump({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1, steps: 2}", "steps stands there twice (line 1, column 19)"),
        ("train:\n  5: 1", "the key 5 is not text (line 2, column 3)"),
        ("train: [", "(line 1, column 9)"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_yaml_mistakes_name_their_place(text: str, words: str):
    with pytest.raises(ValueError) as caught:
        recipe_yaml.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST.replace("steps", "step"))
    with pytest.raises(RecipeError, match=r"^train.step=10 .*did you mean train.steps\? \(and 1 more\)$"):
        load_recipe(path)


def test_a_file_comes_before_a_shipped_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("debug").train.steps == 20
    (tmp_path / "debug").write_text(SMALLEST)
    assert load_recipe("debug").train.steps == 10


# Checks of what fits together; the wrong ones with their whole lines are in test_cli.py.


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_expert_parallelism_goes_with_every_zero_stage_from_1_and_with_offload(stage: int, parallel: int):
    shape = ["cluster.workers=4", f"cluster.expert_parallel={parallel}", f"train.zero_stage={stage}"]
    check(load_recipe("debug", [*shape, "train.offload_optimizer=true"]))


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (["train.warmup_steps=19"], True),
        (["train.warmup_steps=20"], False),
        (["train.sequence_length=1024"], True),
        (["train.sequence_length=1025"], False),
        (["train.micro_batch=4"], True),
        (["train.micro_batch=8"], False),
        (["cluster.workers=1", "cluster.expert_parallel=1", "train.zero_stage=0"], True),
        (["train.zero_stage=0"], False),
        (["model.vocab_size=264"], True),
        (["model.vocab_size=263"], False),
        (["model.num_experts=2"], True),
        (["model.num_experts=3"], False),
    ],
)
def test_the_edges_of_what_fits(overrides: list[str], fits: bool):
    recipe = load_recipe("debug", overrides)
    if fits:
        check(recipe)
    else:
        with pytest.raises(RecipeError):
            check(recipe)


def test_a_new_name_is_free_and_a_used_one_is_not(tmp_path: Path):
    check_run(with_run_dir("debug", tmp_path / "not" / "there" / "yet"))
    (tmp_path / "debug").mkdir()
    check_run(with_run_dir("debug", tmp_path))  # an empty folder is as good as none
    (tmp_path / "debug" / "logs").mkdir()
    check_run(with_run_dir("debug", tmp_path))  # so is what a start that was cut short leaves
    (tmp_path / "debug" / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"run.name=debug has been used already .* run.resume=true"):
        check_run(with_run_dir("debug", tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["debug", "logs", "recipe.yaml"]


def saved_run(folder: Path, *overrides: str) -> None:
    """A run's folder as far as resuming looks at it."""
    run = folder / "debug"
    run.mkdir()
    (run / "recipe.yaml").write_text(with_run_dir("debug", folder, *overrides).resolved_yaml())


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=40",
        "train.zero_stage=3",
        "train.micro_batch=2",
        "train.gradient_checkpointing=true",
        "train.checkpoint_every=5",
        "train.keep_checkpoints=5",
        "train.evaluate_every=5",
        "train.evaluate_rows=5",
        "cluster.workers=1",
        "cluster.max_failures=9",
        "tracking.experiment=other",
        "model.attn_implementation=eager",
    ],
)
def test_how_a_run_goes_on_may_change(tmp_path: Path, change: str):
    saved_run(tmp_path)
    check_run(with_run_dir("debug", tmp_path, "run.resume=true", change))


@pytest.mark.parametrize(
    ("change", "before"),
    [
        ("run.seed=1", "run.seed=0"),
        ("model.preset=tiny", "model.preset=debug"),
        ("model.num_experts=8", "model.num_experts=4"),
        ("model.hidden_size=32", "model.hidden_size was not set then"),
        ("data.held_out=0.1", "data.held_out=0.05"),
        ("data.limit_documents=500", "data.limit_documents=400"),
        ("train.global_batch=16", "train.global_batch=8"),
        ("train.sequence_length=64", "train.sequence_length=128"),
        ("train.learning_rate=1e-4", "train.learning_rate=0.003"),
        ("train.precision=bf16", "train.precision=fp32"),
    ],
)
def test_what_a_run_learns_may_not_change(tmp_path: Path, change: str, before: str):
    saved_run(tmp_path)
    with pytest.raises(RecipeError) as caught:
        check_run(with_run_dir("debug", tmp_path, "run.resume=true", change))
    key = change.partition("=")[0]
    assert str(caught.value).startswith(f"{key}=") and before in str(caught.value)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(16) == [1, 2, 4, 8, 16]
    assert divisors(1) == [1]
    assert divisors(97) == [1, 97]


def test_words():
    assert listed([1, 2, 4]) == "1, 2 or 4" and listed([7]) == "7" and listed(["a", "b"], "and") == "a and b"
    assert listed(range(100)) == "0, 1, 2, 3, 4, 5, 6, 7, …, 97, 98 or 99"
    assert (shown(True), shown(None), shown("a"), shown(1.5)) == ("true", "null", "'a'", "1.5")
    assert len(shown("x" * 500)) == 60
    assert suggestion("trian", ["train", "plan"]) == "did you mean train?"
    assert suggestion("zzz", ["train", "plan"], "verb.") == "use verb.train or verb.plan"
