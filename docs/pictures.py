"""The README's pictures of a sweep, from what MLflow has of it: ``python docs/pictures.py runs/tune [FOLDER]``.

``sweep.png`` is the sweep's own figure of its trials' curves, ``mlflow-tree.svg`` its runs in MLflow, each below its
parent. The sweep's MLflow is the file beside its folder. They are written beside this file, or to FOLDER.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from cluster.tracking import quiet_mlflow

COLOURS = {"FINISHED": "green", "KILLED": "yellow", "FAILED": "red", "RUNNING": "cyan"}


def main(sweep: Path, folder: Path = Path(__file__).parent) -> None:
    """Write both pictures."""
    quiet_mlflow()
    summary = json.loads((sweep / "summary.json").read_text())
    client = MlflowClient(f"sqlite:///{sweep.resolve().parent / 'mlflow.db'}")
    root = client.get_run(summary["mlflow_run_id"])
    curves = client.download_artifacts(root.info.run_id, "figures/learning_curves.png")
    shutil.copy(curves, folder / "sweep.png")
    runs = client.search_runs([root.info.experiment_id], max_results=1000)
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(tree(root, runs, summary["metric"]))
    svg = console.export_svg(title=f"MLflow, experiment {client.get_experiment(root.info.experiment_id).name}")
    (folder / "mlflow-tree.svg").write_text(svg)


def tree(run: Run, runs: list[Run], metric: str, below: Tree | None = None) -> Tree:
    """A run and all below it."""
    words = Text.assemble(
        (f"{run.info.run_name:<12}", "bold"),
        (f"{run.info.status:<10}", COLOURS[run.info.status]),
        (run.info.run_id[:8], "dim"),
    )
    for name, value in ((metric, run.data.metrics.get(metric)), ("best", run.data.metrics.get(f"best.{metric}"))):
        if value is not None:
            words.append(f"  {name} {value:.4f}")
    node = Tree(words) if below is None else below.add(words)
    children = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    for child in sorted(children, key=lambda each: each.info.run_name or ""):
        tree(child, runs, metric, node)
    return node


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/pictures.py SWEEP_DIR [FOLDER]")
    main(*map(Path, sys.argv[1:]))
