"""The Kubernetes manifests: by Kubernetes' own schemas, KubeRay's, and what the deployment promises."""

import copy
import json
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from jobs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/kubernetes"
KUBERAY = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
KUBERNETES = "1.33"


def documents(name: str) -> list[dict]:
    return [each for each in yaml.safe_load_all((FOLDER / name).read_text()) if each]


CLUSTER, JOB = documents("cluster.yaml")[0], documents("job.yaml")[0]
PLAIN = [each for name in ("namespace.yaml", "network-policy.yaml") for each in documents(name)]
CLUSTER_SPECS = {"cluster.yaml": CLUSTER["spec"], "job.yaml": JOB["spec"]["rayClusterSpec"]}


def pod_templates() -> dict[str, dict]:
    """Every pod that the manifests describe, by a name for it."""
    found = {"job.yaml submitter": JOB["spec"]["submitterPodTemplate"]}
    for file, spec in CLUSTER_SPECS.items():
        found[f"{file} head"] = spec["headGroupSpec"]["template"]
        found |= {f"{file} {group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    return found


def as_document(template: dict) -> dict:
    """A pod template as Kubernetes' own kind of that name."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}


def test_every_manifest_is_looked_at():
    assert {path.name for path in FOLDER.iterdir()} == {
        "cluster.yaml",
        "job.yaml",
        "namespace.yaml",
        "network-policy.yaml",
    }
    assert [each["kind"] for each in PLAIN] == ["Namespace", "PersistentVolumeClaim", "NetworkPolicy", "NetworkPolicy"]


@pytest.mark.parametrize("document", PLAIN, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_plain_kinds_are_what_kubernetes_takes(document: dict):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", pod_templates())
def test_pods_are_what_kubernetes_takes(name: str):
    kubernetes_validate.validate(as_document(pod_templates()[name]), KUBERNETES, strict=True)


@pytest.mark.parametrize("document", [CLUSTER, JOB], ids=["cluster.yaml", "job.yaml"])
def test_custom_kinds_are_what_kuberay_takes(document: dict):
    jsonschema.validate(document, KUBERAY)


def test_the_validators_find_mistakes():
    template = copy.deepcopy(CLUSTER["spec"]["headGroupSpec"]["template"])
    template["spec"]["containers"][0]["resourcez"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resourcez"):
        kubernetes_validate.validate(as_document(template), KUBERNETES, strict=True)
    cluster = copy.deepcopy(CLUSTER)
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # KubeRay wants text
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        jsonschema.validate(cluster, KUBERAY)
    cluster = copy.deepcopy(CLUSTER)
    cluster["spec"]["autoscaling"] = True
    with pytest.raises(jsonschema.ValidationError, match="'autoscaling' was unexpected"):
        jsonschema.validate(cluster, KUBERAY)


@pytest.mark.parametrize("name", pod_templates())
def test_no_pod_runs_as_root_or_may_become_it(name: str):
    """What the namespace's pod-security level ``restricted`` asks for; and every pod says how much it takes."""
    assert PLAIN[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = pod_templates()[name]["spec"]
    (container,) = pod["containers"]
    merged = {**pod["securityContext"], **container["securityContext"]}
    assert merged["runAsNonRoot"] is True and merged["runAsUser"] == 1000
    assert merged["seccompProfile"] == {"type": "RuntimeDefault"}
    assert merged["allowPrivilegeEscalation"] is False and merged["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]) == {"requests", "limits"}
    assert pod["automountServiceAccountToken"] is name.endswith("head")  # where the autoscaler is


@pytest.mark.parametrize("file", CLUSTER_SPECS)
def test_a_cluster_has_a_token_a_head_without_work_and_machines_on_demand(file: str):
    spec = CLUSTER_SPECS[file]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["rayVersion"] == ray.__version__  # that of constraints.txt, which the image installs
    assert spec["enableInTreeAutoscaling"] is True
    head, groups = spec["headGroupSpec"], {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in groups.items()}
    assert "nvidia.com/gpu" not in limits["cpu"] and limits["gpu"]["nvidia.com/gpu"] == 1
    claim = PLAIN[1]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in [head["template"], *(group["template"] for group in groups.values())]:
        volume = {"name": "runs", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
        assert template["spec"]["volumes"] == [volume]
        assert template["spec"]["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
        assert 8080 in [port["containerPort"] for port in template["spec"]["containers"][0]["ports"]]


def test_ray_start_knows_its_parameters():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for spec in CLUSTER_SPECS.values():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_the_jobs_cluster_is_the_cluster():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_the_job_is_a_recipe_that_waits_for_its_machines_off_the_head():
    mmada, verb, recipe, *overrides = shlex.split(JOB["spec"]["entrypoint"])
    assert (mmada, verb) == ("mmada", "train")
    loaded = load_recipe(recipe, overrides)
    assert loaded.cluster.address == "auto" and loaded.cluster.queue_timeout > 0
    assert str(loaded.run_dir).startswith("/runs/")
    assert JOB["spec"]["entrypointNumCpus"] > 0


def test_the_network_lets_in_who_has_business():
    ray_policy, nobody = PLAIN[2], PLAIN[3]
    assert nobody["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    nodes = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert ray_policy["spec"]["podSelector"] == nodes
    among, people, prometheus = ray_policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": nodes}]}
    submitter = JOB["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert people["from"][0] == {"podSelector": {"matchLabels": submitter}}
    assert [port["port"] for port in people["ports"]] == [8265]
    assert 8080 in [port["port"] for port in prometheus["ports"]]
