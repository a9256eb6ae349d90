"""What else lies in infra/, each file by the validator of its own world."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import mlflow.cli
import mlflow.server.security_utils as mlflow_security
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from jobs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
TOOLS = Path(sys.executable).parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
OPTION = re.compile(r"(--[a-z0-9-]+)")


def run(tool: str, *arguments: object) -> tuple[int, str]:
    done = subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_images_pass_hadolint_and_run_as_nobody_in_particular(tmp_path):
    for file in INFRA.rglob("Dockerfile"):
        assert run("hadolint", file) == (0, ""), file
        lines = file.read_text().splitlines()
        assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"], file
        bases = [line.split()[1] for line in lines if line.startswith("FROM")]
        assert set(bases) == {"python:3.11-slim-bookworm"}  # what the pins were tried on
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN apt-get install gcc\n")
    code, said = run("hadolint", bad)
    assert code == 1 and "DL3006" in said


def test_the_image_copies_what_there_is_and_leaves_out_what_is_nobodys_business():
    text = (INFRA / "image/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for name in line.split()}
    ignored = (INFRA / "image/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert "**" in ignored  # nothing but those: no runs, no tokens
    assert all((ROOT / name).exists() for name in copied)
    assert "RAY_AUTH_MODE=token" in text


def test_the_servers_image_has_the_pinned_mlflow():
    assert f"mlflow=={PINS['mlflow']} " in (INFRA / "mlflow/Dockerfile").read_text()


def test_scripts_pass_shellcheck(tmp_path):
    scripts = [*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")]
    assert len(scripts) == 2
    for file in scripts:
        assert run("shellcheck", file) == (0, ""), file
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/bash\nrm $1\n")
    code, said = run("shellcheck", bad)
    assert code == 1 and "SC2086" in said


@pytest.mark.parametrize("name", ["mlflow", "monitoring"])
def test_compose_files_are_what_compose_takes(name: str, tmp_path):
    file = INFRA / name / "compose.yaml"
    assert run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)[0] == 0
    composed = yaml.safe_load(file.read_text())
    services = composed["services"]
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(composed["secrets"])
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"} and "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in composed["volumes"] or (file.parent / source).exists(), volume
        for port in service.get("ports", []):  # this machine alone, unless somebody says otherwise
            assert port.startswith(("127.0.0.1:", "${MLFLOW_BIND:-127.0.0.1}:"))
        for key, value in service.get("environment", {}).items():  # passwords come as files
            assert "PASSWORD" not in key or value.startswith("/run/secrets/"), key
    composed["services"][next(iter(services))]["restarts"] = "always"
    bad = tmp_path / "compose.yaml"
    bad.write_text(yaml.safe_dump(composed))
    code, said = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", bad)
    assert code == 1 and "restarts" in said


def test_mlflow_takes_what_the_server_is_started_with():
    text = (INFRA / "mlflow/start.sh").read_text()
    command = text[text.index("exec mlflow server") :]
    known = {option for parameter in mlflow.cli.server.params for option in parameter.opts}
    given = set(OPTION.findall(command))
    assert {"--host", "--artifacts-destination", "--allowed-hosts"} <= given <= known
    hosts = yaml.safe_load((INFRA / "mlflow/compose.yaml").read_text())["services"]["mlflow"]["environment"]
    allowed = hosts["MLFLOW_SERVER_ALLOWED_HOSTS"].removeprefix("${MLFLOW_ALLOWED_HOSTS:-").removesuffix("}").split(",")
    assert mlflow_security.is_allowed_host_header(allowed, "localhost:5000")
    assert not mlflow_security.is_allowed_host_header(allowed, "elsewhere.example:5000")


def test_prometheus_takes_its_configuration():
    schema = json.loads((Path(__file__).parent / "prometheus.schema.json").read_text())
    for name in ("prometheus.yml", "prometheus-kubernetes.yml"):
        config = yaml.safe_load((INFRA / "monitoring" / name).read_text())
        jsonschema.validate(config, schema)
        # Ray's nodes renew what they serve every ten seconds.
        assert int(config["global"]["scrape_interval"].removesuffix("s")) > 10
    targets = yaml.safe_load((INFRA / "monitoring/targets/this-machine.yaml").read_text())
    jsonschema.validate(targets, {"$ref": "#/$defs/targets", "$defs": schema["$defs"]})
    config["scrape_configs"][0]["scrape_intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError, match="scrape_intervall"):
        jsonschema.validate(config, schema)


def test_ray_up_takes_its_configuration():
    config = yaml.safe_load((INFRA / "cloud/aws.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    growing = {name: kind for name, kind in prepared["available_node_types"].items() if name != "head"}
    assert set(growing) == {"cpu", "gpu"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in growing.values())
    assert prepared["max_workers"] >= sum(kind["max_workers"] for kind in growing.values())
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in commands[-1]
        check_ray_start(commands[-1])
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    broken = {**config, "idle_timeout": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(broken))


def test_slurm_starts_ray_with_a_token_and_hands_on_what_mmada_takes():
    text = (INFRA / "slurm/mmada.sbatch").read_text()
    for command in re.findall(r'(?:bin/ray"|"\$0") (start .*?)(?:>|&&)', text.replace("\\\n", " "), re.S):
        check_ray_start(f"ray {command}")
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in text and "umask 077" in text
    keys = re.search(r'"\$mmada_bin/mmada" "\$1" "\$2" (.*) "\$\{@:3\}"', text)
    overrides = [each.replace("$head_ip:$port", "10.0.0.1:20001") for each in shlex.split(keys[1])]
    assert load_recipe("quickstart", overrides).cluster.queue_timeout > 0


def check_ray_start(command: str) -> None:
    options = set(OPTION.findall(command[command.index("ray start") :]))
    assert len(options) > 1 and options <= {option for parameter in ray_start.params for option in parameter.opts}


def test_the_versions_are_those_of_the_pins():
    assert PINS["ray"] == ray.__version__


# What the README says.

README = (INFRA / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, re.S)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if line.strip() and not line.startswith("#")
]


def test_ten_commands_are_enough_for_each_target():
    parts = re.split(r"^## ", README, flags=re.M)[1:]
    counts = {}
    for part in parts:
        block = re.search(r"```\n(.*?)```", part, re.S)
        lines = re.sub(r"\\\n\s*", "", block[1] if block else "").splitlines()
        counts[part.splitlines()[0]] = sum(bool(line.strip()) and not line.startswith("#") for line in lines)
    for target in ("Kubernetes", "Cloud machines", "Slurm", "Watching"):
        (title,) = [each for each in counts if each.startswith(target)]
        assert 1 <= counts[title] <= 10, (title, counts[title])


def test_files_that_the_readme_names_are_there():
    named = set(re.findall(r"(?<![\w/])infra/[\w./-]+", README))
    assert len(named) > 6
    assert [each for each in sorted(named) if not (ROOT / each.rstrip("./")).exists()] == []


def test_recipes_of_the_readme_are_recipes():
    found = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if "mmada" not in [Path(word).name for word in words] or not {"train", "ppo", "plan"} & set(words):
            continue
        verb = next(place for place, word in enumerate(words) if word in ("train", "ppo", "plan"))
        overrides = [word for word in words[verb + 2 :] if re.fullmatch(r"[a-z]+\.\w+=.*", word)]
        load_recipe(words[verb + 1], overrides)
        found += 1
    assert found >= 3
