"""What doctor finds, and what it makes of it."""

import io
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from jobs import doctor
from jobs.doctor import LEAST_MEMORY, Finding

THERE = Finding("a", "1.0")
MISSING = Finding("b", "not installed", good=False, remedy="install b")
OPTIONAL = Finding("c", "none", good=False, needed=False, remedy="install c, or do without")


def test_only_what_is_needed_makes_a_machine_unfit():
    assert doctor.fit([THERE, OPTIONAL]) and not doctor.fit([THERE, MISSING])


@pytest.mark.parametrize(("findings", "code"), [([THERE, OPTIONAL], 0), ([THERE, MISSING], 1)])
def test_the_exit_code_and_the_remedies(
    findings: list[Finding], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "packages", lambda: findings)
    for check in ("python", "gpu", "cores", "memory", "shared_memory", "disk"):
        monkeypatch.setattr(doctor, check, lambda: THERE)
    monkeypatch.setattr(doctor, "compilers", lambda: [])
    assert doctor.run() == code
    out = capsys.readouterr().out
    for finding in findings:
        assert (f"{finding.what}: {finding.found}; {finding.remedy}" in out) == (not finding.good)
    assert ("everything needed is there" in out) == (code == 0)


def test_packages_are_compared_with_what_is_asked():
    assert doctor.package(Requirement("pytest>=1")) == Finding(
        "pytest", version("pytest"), True, remedy=doctor.package(Requirement("pytest>=1")).remedy
    )
    too_old = doctor.package(Requirement("pytest>=999"))
    assert not too_old.good and too_old.needed and "pytest>=999 is needed" in too_old.remedy
    absent = doctor.package(Requirement("no-such-distribution"))
    assert (absent.found, absent.good) == ("not installed", False) and "make install" in absent.remedy


def test_every_runtime_dependency_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    lines = ["torch>=2", "pydantic", 'pytest>=9; extra == "test"', 'nothing; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    assert [finding.what for finding in doctor.packages()] == ["torch", "pydantic"]
    assert all(finding.good for finding in doctor.packages())


def test_a_distribution_that_is_not_installed_is_one_finding():
    (finding,) = doctor.packages("no-such-distribution")
    assert not finding.good and finding.needed and "pip install" in finding.remedy


def test_compilers_are_optional():
    found = doctor.compilers(find=lambda tool: f"/usr/bin/{tool}" if tool == "gcc" else None)
    assert [(finding.what, finding.good) for finding in found] == [("gcc", True), ("g++", False)]
    assert found[0].found == "/usr/bin/gcc" and doctor.fit(found)


@pytest.mark.parametrize(("available", "good"), [(LEAST_MEMORY, True), (LEAST_MEMORY - 1, False)])
def test_memory(available: int, good: bool):
    assert doctor.memory(available).good is good


def test_disk_and_shared_memory_name_the_folder(tmp_path: Path):
    assert doctor.disk(tmp_path, least=0).good and str(tmp_path) in doctor.disk(tmp_path).found
    assert not doctor.disk(tmp_path, least=2**62).good
    assert not doctor.shared_memory(tmp_path / "none").good
    assert not doctor.shared_memory(tmp_path, least=2**62).good
    assert doctor.shared_memory(tmp_path, least=0).good


def test_an_attempt_that_fails_is_a_finding_and_leaves_nothing():
    places: list[Path] = []

    def work(folder: Path) -> str:
        places.append(folder)
        (folder / "file").write_text("x")
        raise OSError("no\nroom")

    finding = doctor.attempt("MLflow", work)
    assert not finding.good and finding.needed and finding.found == "failed: no room"
    assert not places[0].exists()


def test_the_table_says_which_are_missing():
    out = io.StringIO()
    doctor.show([THERE, MISSING, OPTIONAL], Console(file=out, width=80))
    rows = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert ["ok", "a", "1.0"] in rows and ["no", "b", "not", "installed"] in rows and ["--", "c", "none"] in rows


def test_deep_starts_ray_and_writes_to_mlflow(tmp_path: Path):
    ray = doctor.attempt("Ray", doctor.start_ray)
    assert ray.good, ray.found
    mlflow = doctor.attempt("MLflow", doctor.write_mlflow)
    assert mlflow.good and mlflow.found.startswith("wrote a run to sqlite:///"), mlflow.found
