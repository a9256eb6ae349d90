"""The Grafana dashboard names what a real run exports, all of it and nothing else."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from cluster.exported_metrics import SweepMetrics
from cluster.session import RaySession

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "infra/monitoring/grafana/mmada.json").read_text())
OWN = "ray_mmada_"
# The least that reinforcement learning can be: it exports what a run of `mmada train` does, and more.
SMALL = """
    cluster.workers=1 cluster.expert_parallel=1 ppo.rollout_workers=1 ppo.reward_workers=1 ppo.iterations=2
    ppo.prompts_per_iteration=4 ppo.minibatch=4 ppo.checkpoint_every=0 ppo.table_every=0 run.name=watched
"""


def expressions() -> list[str]:
    """The dashboard's queries, with Grafana's variables filled in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [each.replace("$__rate_interval", "1m").replace("$run", ".*").replace("$sweep", ".*") for each in found]


def selectors(node) -> Iterator[tuple[str, set[str]]]:
    """Every metric in a query, with the labels by which it is chosen or grouped."""
    labels = set(node.modifier.labels) if getattr(node, "modifier", None) else set()
    if isinstance(node, promql_parser.MatrixSelector):
        node = node.vector_selector
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
        return
    for child in [*getattr(node, "args", []), *([node.expr] if hasattr(node, "expr") else [])]:
        yield from ((name, own | labels) for name, own in selectors(child))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, set[str]]:
    """The labels of everything that Ray's node served while a run and a sweep were on: by name of the metric."""
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # as often as Ray does it
        with RaySession(None, workers=2, cpus_per_worker=2, gpus_per_worker=0, log_dir=folder, timeout_s=60) as session:
            (node,) = ray.nodes()
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            run = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "ppo", "ppo-debug", *SMALL.split()]
                + [f"cluster.address={session.gcs_address}", f"run.dir={folder}"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            found: dict[str, set[str]] = defaultdict(set)
            with SweepMetrics("a-sweep", "held_out_accuracy") as sweep:
                sweep.trials(pending=2, running=1, done=3, stopped=1)
                sweep.best(0.5)
                deadline = time.monotonic() + 240
                while run.poll() is None and time.monotonic() < deadline:
                    take_in(address, found)
                    time.sleep(0.5)
            take_in(address, found)
            run.kill()
            said, _ = run.communicate(timeout=30)
    assert run.returncode == 0, said
    return found


def take_in(address: str, found: dict[str, set[str]]) -> None:
    with urllib.request.urlopen(address, timeout=30) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                found[sample.name] |= set(sample.labels)
                if sample.name == f"{OWN}sweep_trials":
                    found[f"{sample.name} {sample.labels['state']}"].add(str(sample.value))


def test_every_query_of_the_dashboard_finds_what_a_run_exports(exported):
    used = [each for text in expressions() for each in selectors(promql_parser.parse(text))]
    assert len(used) > 20
    assert [name for name, _ in used if name not in exported] == []
    assert [(name, labels) for name, labels in used if not labels <= exported[name]] == []


def test_everything_that_is_exported_is_on_the_dashboard(exported):
    used = {name for text in expressions() for name, _ in selectors(promql_parser.parse(text))}
    own = {name for name in exported if name.startswith(OWN) and " " not in name}
    assert own - used == set()
    assert {f"{OWN}tokens_total", f"{OWN}failures", f"{OWN}held_out", f"{OWN}sweep_best"} <= own


def test_a_sweep_counts_its_trials(exported):
    counts = {"pending": "2.0", "running": "1.0", "done": "3.0", "stopped": "1.0", "failed": "0.0"}
    assert {state: exported[f"{OWN}sweep_trials {state}"] for state in counts} == {
        state: {count} for state, count in counts.items()
    }


def test_panels_do_not_lie_on_each_other_and_variables_are_there():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for each in (panel["gridPos"] for panel in panels)
        for x in range(each["x"], each["x"] + each["w"])
        for y in range(each["y"], each["y"] + each["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    queries = " ".join(target["expr"] for panel in panels for target in panel.get("targets", []))
    assert set(re.findall(r"\$(\w+)", queries)) - {"__rate_interval"} == declared
    for variable in DASHBOARD["templating"]["list"]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        assert label == variable["name"] and metric in queries
