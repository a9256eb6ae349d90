"""The house's walls: who may import whom, and what costs nothing to import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("cluster", "jobs", "mmada")
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

# folder (or file) -> packages that nothing in it imports
FORBIDDEN = {
    "mmada": ("jobs", "cluster", "ray", "deepspeed", "mlflow", "torch.distributed"),
    "cluster": ("jobs", "mmada"),
}
# package -> where alone it is imported. The benches measure other libraries and may import what they measure.
ONLY_IN = {
    "deepspeed": ("cluster/engine.py", "jobs/bench/"),
    "mlflow": ("cluster/tracking",),
}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that a file imports at any depth, absolute, with its line; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(each.value)) for each in node.args[:1] if isinstance(each, ast.Constant))


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(file: str, source: str) -> list[str]:
    """Imports of one file (its path relative to the repository) that go against the rules."""
    found = []
    for line, name in imported_names(ast.parse(source)):
        if name.startswith("."):
            found.append(f"{file}:{line} imports relatively; write the whole name")
        for package in FORBIDDEN.get(file.split("/")[0], ()):
            if is_within(name, package):
                found.append(f"{file}:{line} imports {name}")
        for package, homes in ONLY_IN.items():
            if is_within(name, package) and not file.startswith(homes):
                found.append(f"{file}:{line} imports {name}, which belongs to {homes[0]}")
    return found


def test_imports_run_one_way():
    assert len(SOURCES) > 20, "the sources are not where this test looks"
    assert [each for path in SOURCES for each in offences(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mmada/model.py", "import ray"),
        ("mmada/model.py", "from torch import distributed"),
        ("mmada/model.py", "import torch.distributed as dist"),
        ("mmada/model.py", "def f():\n    from torch.distributed import all_reduce"),
        ("mmada/nn/moe.py", "from cluster.engine import Engine"),
        ("cluster/session.py", "import jobs.recipe"),
        ("cluster/session.py", "from mmada import errors"),
        ("cluster/session.py", "import importlib\nimportlib.import_module('mmada.model')"),
        ("cluster/checkpoints.py", "from deepspeed.checkpoint import ds_to_universal"),
        ("jobs/train.py", "import mlflow"),
        ("jobs/train.py", "from . import recipe"),
    ],
)
def test_the_rule_finds_what_it_forbids(file: str, source: str):
    assert len(set(offences(file, source))) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mmada/model.py", "import torch\nfrom torch import nn\nimport raytracer"),
        ("cluster/engine.py", "import deepspeed\nimport torch.distributed as dist"),
        ("jobs/train.py", "from cluster.session import RaySession\nfrom mmada.data import prepare\nimport ray.train"),
        ("jobs/bench/moe.py", "from deepspeed.moe.layer import MoE"),
    ],
)
def test_the_rule_lets_pass_what_is_allowed(file: str, source: str):
    assert offences(file, source) == []


def test_packages_only_hand_names_on():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign)
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        docstring, *body = ast.parse(path.read_text()).body or [None]
        assert isinstance(docstring, ast.Expr), f"{path} does not say what the package is"
        for node in body:
            assert isinstance(node, allowed), f"{path}:{node.lineno} does more than hand names on"
            assert not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) == "__all__", (
                f"{path}:{node.lineno}"
            )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["train", "--help"], ["bench", "--help"], ["trian"], ["train", "quickstart", "train.steps=x"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_help_and_early_mistakes_import_nothing_heavy(arguments: list[str]):
    program = (
        "import sys; from jobs.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'mlflow', 'numpy', 'datasets'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def loaded_by(program: str) -> set[str]:
    """Names of all modules that there are at a program's end."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_worker_loads_nothing_of_the_drivers():
    """Every worker of every run waits for all that is loaded."""
    loaded = loaded_by("import jobs.worker_start, jobs.worker")
    assert {"torch", "deepspeed", "mmada.model"} <= loaded
    assert loaded & {"mlflow", "matplotlib.figure", "datasets", "scipy.stats", "rich", "jobs.driver"} == set()


def test_a_driver_loads_no_model():
    loaded = loaded_by("""
from jobs.recipe import load_recipe
from jobs.recipe_checks import check
recipe = load_recipe("debug", [])
check(recipe)
from jobs import train
from jobs.objectives.registry import objective_class
objective_class(recipe)
""")
    assert {"mmada.config", "jobs.driver", "jobs.objectives.text"} <= loaded
    assert loaded & {"deepspeed", "mmada.model", "transformers.modeling_utils", "torch._dynamo"} == set()
