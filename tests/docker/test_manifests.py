"""docker/: every file is what the program that reads it takes, and says the same as the code and constraints.txt."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from infscan.engine.worker_group import _ACTOR
from tests.steps.runs import compose

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
KUBERAY = sorted((DOCKER / "kuberay").glob("ray*.yaml"))


def checked(*command: str) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def version(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of a RayCluster or a RayJob."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
        spec = spec["rayClusterSpec"]
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])


def test_the_dockerfile_is_clean() -> None:
    checked("hadolint", "docker/Dockerfile")


def test_the_slurm_script_is_clean() -> None:
    checked("shellcheck", "docker/slurm.sh")


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_takes_the_manifest(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, yaml.safe_load(Path(__file__).with_name("kuberay.yaml").read_text()))
    for template in templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, "1.33", strict=True)


@pytest.mark.parametrize("broken", ["imagePullSecret", "env", "minReplica"])
def test_a_typing_error_in_a_manifest_is_found(broken: str) -> None:
    manifest = yaml.safe_load((DOCKER / "kuberay" / "raycluster.yaml").read_text())
    group = manifest["spec"]["workerGroupSpecs"][0]
    if broken == "minReplica":
        group["minReplica"] = group.pop("minReplicas")
        with pytest.raises(jsonschema.ValidationError, match="minReplica"):
            jsonschema.validate(manifest, yaml.safe_load(Path(__file__).with_name("kuberay.yaml").read_text()))
        return
    group["template"]["spec"][broken] = []
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
    with pytest.raises(kubernetes_validate.ValidationError, match=broken):
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_kubernetes_takes_the_secret_and_pods_take_secrets_from_it_alone() -> None:
    secret = yaml.safe_load((DOCKER / "kuberay" / "secrets.yaml").read_text())
    kubernetes_validate.validate(secret, "1.33", strict=True)
    for path in KUBERAY:
        for template in templates(yaml.safe_load(path.read_text())):
            for container in template["spec"]["containers"]:
                assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
                assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
                assert not {entry["name"] for entry in container["env"]} & set(secret["stringData"])


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_the_manifest_has_the_ray_of_constraints(path: Path) -> None:
    assert set(re.findall(r"rayVersion: (\S+)", path.read_text())) == {version("ray")}


def test_the_cluster_launcher_takes_its_file() -> None:
    config = yaml.safe_load((DOCKER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    config["available_node_types"]["spot"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_jobs_in_the_files_have_settings_that_exist() -> None:
    """The entry point of the RayJob, and what the SLURM script adds."""
    job = yaml.safe_load((DOCKER / "kuberay" / "rayjob.yaml").read_text())["spec"]
    python, script, *overrides = job["entrypoint"].split()
    assert (python, script) == ("python", "/app/jobs/scan.py")
    config = compose("scan", *overrides)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert config.cluster.num_workers == group["maxReplicas"]
    assert config.cluster.gpus_per_rank == float(requests["nvidia.com/gpu"])
    assert config.cluster.cpus_per_rank < int(requests["cpu"])
    assert "cluster=gpu cluster.num_workers=" in (DOCKER / "slurm.sh").read_text()


def test_ray_itself_restarts_no_rank() -> None:
    """docs/cluster.md explains why: the driver counts attempts and rebuilds the whole group."""
    assert _ACTOR._default_options["max_restarts"] == 0
    assert _ACTOR._default_options["max_task_retries"] == 0
