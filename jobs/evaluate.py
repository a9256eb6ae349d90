"""``mmada evaluate``: how well the model of a checkpoint does on what it has not learned from.

A language model is given held-out problems where there are tasks, and held-out text where there are none; a reward
model is given held-out pairs. Which, says the recipe of the checkpoint's run, and ``section.key=value`` over it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from jobs import recipe_yaml
from jobs.calibration import held_out_calibration
from jobs.checkpoint_folder import holds_reward_model, model_folder, recipe_of
from jobs.driver import shown_path
from jobs.evaluation import bits_per_byte
from jobs.evaluation_tasks import Answer, EvaluationResult, accuracy_of, held_out_accuracy, score_of
from jobs.learned_problems import Question, learned_questions, question_of
from jobs.objectives.mixture import recipes_of
from jobs.objectives.objective import Place
from jobs.objectives.reward import held_out_metrics, judge, preferences
from jobs.plan_report import table_of
from jobs.prepared_data import text_source
from jobs.quiet_transformers import quiet_transformers
from jobs.recipe import Recipe, RecipeError, apply_override, first_mistake
from jobs.recipe_checks_tasks import check_objective
from jobs.task_source import load_recipe_tasks
from mmada.data import load_tokenizer, prepare
from mmada.data.preferences import PairRows
from mmada.data.task_rows import answer_ids
from mmada.errors import DataError
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import MMaDARewardModel

# What a recipe must say and an evaluation does not ask.
_UNASKED: dict[str, dict[str, Any]] = {
    "run": {"name": "evaluation"},
    "model": {"preset": "debug"},
    "train": {"steps": 1},
}
_OPEN = ("tasks.", "data.", "train.sequence_length")
_ROWS = 16  # of a forward pass
_NEW_TOKENS = 64  # where neither a recipe nor the right answers say how long an answer may be


@dataclass(frozen=True)
class Settings:
    """How answers are sampled and what is shown of them."""

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None
    seed: int = 0
    slots: int = 32
    show: int = 0
    json_file: Path | None = None


def run(checkpoint: str, overrides: Sequence[str], settings: Settings) -> int:
    """Print what is measured. Raises RecipeError, DataError or ClusterError for what cannot be evaluated."""
    with quiet_transformers():
        return _run(checkpoint, overrides, settings)


def _run(checkpoint: str, overrides: Sequence[str], settings: Settings) -> int:
    folder = model_folder(checkpoint)
    recipe = evaluated_recipe(checkpoint, overrides, is_reward=holds_reward_model(folder))
    tokenizer = load_tokenizer(str(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = MMaDARewardModel if holds_reward_model(folder) else MMaDAForCausalLM
    model = kind.from_pretrained(folder).eval().to(device)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"model    {shown_path(folder.resolve())}", markup=False)
    if isinstance(model, MMaDARewardModel):
        found = evaluate_pairs(model, tokenizer, recipe, console)
    else:
        found = {}
        for name, own in (recipes_of(recipe) if recipe.data.source == "mixture" else {"": recipe}).items():
            if name:
                console.print(f"source   {name}")
            if own.tasks is not None:
                said = evaluate_tasks(model, tokenizer, own, learned_questions(checkpoint), settings, console)
            else:
                said = evaluate_text(model, tokenizer, own, recipe_of(checkpoint), console)
            found |= {name: said} if name else said
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps({"model": str(folder), **found}, indent=1) + "\n", encoding="utf-8")
    return 0


def evaluated_recipe(checkpoint: str, overrides: Sequence[str], *, is_reward: bool) -> Recipe:
    """The recipe of the checkpoint's run, or an empty one, with what the command line says over it."""
    saved = recipe_of(checkpoint)
    try:
        values = _UNASKED if saved is None else recipe_yaml.parse(saved.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"checkpoint={checkpoint} lies in a run whose {saved} cannot be read; restore it") from error
    values = {name: dict(keys) for name, keys in values.items()}
    for override in overrides:
        if not override.startswith(_OPEN):
            raise RecipeError(f"override={override} changes nothing in an evaluation; use tasks.…=… or data.…=…")
        apply_override(values, override)
    sections = {override.partition(".")[0] for override in overrides}
    if "tasks" in sections:  # an exported model, or one that learned from something else
        values["data"] = {"tokenizer": values.get("data", {}).get("tokenizer", "bytes"), "source": "tasks"}
    if saved is None and not sections & {"tasks", "data"}:
        raise RecipeError(
            f"checkpoint={checkpoint} lies in no run whose recipe says what was held out; give tasks.family=…, or "
            "data.source=… with data.path=…"
        )
    if is_reward:
        values["train"]["objective"] = "reward"
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(first_mistake(error)) from error
    if is_reward or recipe.data.source == "tasks":
        check_objective(recipe)
    return recipe


def evaluate_tasks(
    model: MMaDAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    learned: Set[Question],
    settings: Settings,
    console: Console,
) -> dict[str, Any]:
    """Accuracy and mean score on held-out problems, by family and in all; those that were ``learned`` are left out.

    Raises RecipeError where none is left.
    """
    tasks = load_recipe_tasks(recipe)
    items = [item for item in tasks.held_out if question_of(item) not in learned]
    if not items:
        raise RecipeError(
            f"tasks.held_out={tasks.source.held_out} keeps nothing apart that this model has not learned from; use the "
            "tasks section that it was trained with, or another tasks.seed"
        )
    longest = settings.max_new_tokens or default_length(recipe, tokenizer)
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    each = "" if settings.samples == 1 else f", {settings.samples} samples each"
    known = len(tasks.held_out) - len(items)
    left_out = f" ({known:,} more were learned from and are left out)" if known else ""
    console.print(f"tasks    {len(items):,} held-out problems{left_out}, {how}{each}, at most {longest} new tokens")
    try:
        result = held_out_accuracy(
            model,
            tokenizer,
            tasks,
            max_new_tokens=longest,
            temperature=settings.temperature,
            samples=settings.samples,
            seed=settings.seed,
            slots=settings.slots,
            items=items,
        )
    except ValueError as error:
        raise DataError(f"--max-new-tokens={longest} cannot be sampled: {error}") from error
    show_answers(result, settings.show, console)
    show_result(result, console)
    families = {name: summary_of(answers) for name, answers in result.families.items()}
    return {
        "kind": "tasks",
        "settings": {"max_new_tokens": longest, "temperature": settings.temperature, "samples": settings.samples},
        **summary_of(result.answers),
        "families": families,
        "seconds": result.seconds,
        "new_tokens": result.new_tokens,
        "answers": [answer_as_json(answer) for answer in result.answers],
    }


def default_length(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """New tokens that reinforcement learning allowed, or those of the longest right answer, held out or not."""
    if recipe.ppo is not None:
        return recipe.ppo.max_new_tokens
    tasks = load_recipe_tasks(recipe)
    answers = [item.answer for item in (*tasks.train, *tasks.held_out)]
    return max(len(answer_ids(tokenizer, answer)) if answer is not None else _NEW_TOKENS for answer in answers)


def summary_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy and mean score with their intervals, as JSON."""
    return {"accuracy": asdict(accuracy_of(answers)), "score": asdict(score_of(answers))}


def answer_as_json(answer: Answer) -> dict[str, Any]:
    """One problem with all that was answered."""
    item = answer.item
    asked = {"family": item.family, "prompt": item.prompt, "answer": item.answer}
    return asked | {"texts": answer.texts, "scores": answer.scores}


def show_result(result: EvaluationResult, console: Console) -> None:
    """A line per family, and one for all where there are several."""
    table = table_of("family", "problems", "solved", "95 % interval", "score", "95 % interval", "ended")
    rows = list(result.families.items())
    for name, answers in [*rows, ("all", result.answers)] if len(rows) > 1 else rows:
        ended = sum(map(sum, (answer.ended for answer in answers))) / sum(len(answer.ended) for answer in answers)
        found = accuracy_of(answers), score_of(answers)
        cells = [cell for each in found for cell in (f"{each.mean:.3f}", f"{each.low:.3f} {each.high:.3f}")]
        table.add_row(name, str(len(answers)), *cells, f"{ended:.2f}")
    speed = result.new_tokens / result.seconds
    table.caption = f"{result.seconds:.1f} s, {result.new_tokens:,} new tokens, {speed:,.0f} tokens/s"
    console.print(table)
    if refusals := [text for answer in result.answers for text in answer.refusals]:
        console.print(f"{len(refusals)} answers were refused by the scorer and count 0: {refusals[0]}", markup=False)


def show_answers(result: EvaluationResult, count: int, console: Console) -> None:
    """The first problems with their first answers."""
    for answer in result.answers[:count]:
        marks = f"{answer.scores[0]:g}" + ("" if answer.item.answer is None else f", right: {answer.item.answer!r}")
        console.print(f"{answer.item.prompt!r}\n    {answer.texts[0]!r}  ({marks})", markup=False)


def evaluate_text(
    model: MMaDAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    saved: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Bits per held-out byte; the text is prepared beside the runs, or for now where there is no run."""
    with tempfile.TemporaryDirectory() as aside:
        cache = Path(aside) if saved is None else saved.parent.parent / ".data"
        text = prepare(text_source(recipe), tokenizer, cache, held_out=recipe.data.held_out).held_out
        rows = text.rows(recipe.train.sequence_length)
        place = here(model)
        bits = bits_per_byte(model, rows, num_bytes=text.num_bytes, batch_rows=_ROWS, max_rows=None, place=place)
        console.print(f"text     {text.num_bytes:,} held-out bytes, rows of {recipe.train.sequence_length}")
        console.print(f"         {bits:.4f} bits per held-out byte")
        found: dict[str, Any] = {"kind": "text", "bits_per_byte": bits, "bytes": text.num_bytes}
        if len(rows) < 2:
            return found
        trust = held_out_calibration(model, rows, batch_rows=_ROWS, place=place)
        console.print(
            f"         calibration error {trust.error:.2%}, and {trust.scaled_error:.2%} at temperature "
            f"{trust.temperature:.3f}, fitted on every other row"
        )
        return found | trust.metrics()


def evaluate_pairs(
    model: MMaDARewardModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, console: Console
) -> dict[str, Any]:
    """Every held-out metric of a reward model."""
    rows = PairRows(preferences(recipe).held_out, tokenizer, recipe.train.sequence_length)
    found = judge(model, rows, here(model), _ROWS, None)
    metrics = held_out_metrics(found, [pair.kind for pair in rows.pairs])
    table = table_of("held-out pairs", f"{len(rows):,}")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(table)
    return {"kind": "pairs", "pairs": len(rows), **metrics}


def here(model: torch.nn.Module) -> Place:
    """This process alone."""
    device = next(model.parameters()).device
    return Place(0, 1, device, lambda value: value)
