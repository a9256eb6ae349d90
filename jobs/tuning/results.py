"""What a sweep leaves: ``trials.csv``, ``best.yaml``, and figures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.tracking import flatten
from jobs import recipe_yaml
from jobs.recipe_checks_tune import Search
from jobs.tuning.book import Book, TrialEntry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRIALS, BEST = "trials.csv", "best.yaml"


def write_trials(path: Path, entries: Sequence[TrialEntry], metric: str) -> None:
    """A row for every trial: number, status, steps, the metric, seconds, its settings, its run in MLflow."""
    names = list(dict.fromkeys(name for entry in entries for name in flatten(entry.settings)))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "status", "steps", metric, "seconds", *names, "mlflow_run_id", "error"])
        for entry in entries:
            settings = flatten(entry.settings)
            value = "" if entry.value is None else repr(entry.value)
            row = [entry.number, entry.status, entry.step, value, f"{entry.seconds:.1f}"]
            writer.writerow([*row, *(settings.get(name, "") for name in names), entry.mlflow_run_id, entry.error])


def write_best(path: Path, search: Search, best: TrialEntry) -> None:
    """The recipe with the best trial's settings, which ``mmada train`` (or ``ppo``) takes as it is."""
    values = search.values_with(best.settings)
    run = {key: value for key, value in values["run"].items() if key != "resume"}
    values["run"] = {**run, "name": f"{search.recipe.run.name[:90]}-best"}
    lines = [
        f"# The best of {search.trials} trials of {search.recipe.run.name}: {best.name}, {search.metric} "
        f"{best.value:.6g} after {best.step} steps.",
        f"#   mmada {search.settings.verb} {path}",
    ]
    if best.earlier:
        lines.append("# Population-based training came to these settings on the way. Before, it had")
        lines += [f"#   until step {each['until']}: {flatten(each['settings'])}" for each in best.earlier]
    path.write_text("\n".join(lines) + "\n\n" + recipe_yaml.dump(values), encoding="utf-8")


def figures(search: Search, book: Book) -> dict[str, Figure]:
    """The objective over each setting, learning curves, parallel coordinates; none before two trials have a value."""
    from mmada.plots.sweep import objective_figure, parallel_coordinates, trial_curves

    entries = [entry for _, entry in sorted(book.trials.items()) if entry.value is not None]
    if len(entries) < 2:
        return {}
    best = book.best(search.mode)
    place = entries.index(best) if best is not None else None
    flat = [_flat(entry.settings) for entry in entries]
    names = list(dict.fromkeys(name for each in flat for name in each))
    columns = {name: [each.get(name, "") for each in flat] for name in names}
    values = [entry.value or 0.0 for entry in entries]
    curves = {entry.name: sorted(entry.values.items()) for entry in entries}
    name = search.recipe.run.name
    return {
        "objective": objective_figure(columns, values, [e.status == "done" for e in entries], search.metric, place),
        "learning_curves": trial_curves(curves, search.metric, name, None if best is None else best.name),
        "parallel_coordinates": parallel_coordinates(
            columns, values, search.metric, lower_is_better=search.mode == "min"
        ),
    }


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a name for each value of a section; lists as text."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            found[key] = value if isinstance(value, int | float | bool) else str(value)
    return found
