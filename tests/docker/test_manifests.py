"""docker/: every file is what the program that reads it takes, and says the same as the code and constraints.txt."""

from __future__ import annotations

import copy
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
from infscan.secrets import names_secret
from tests.docker.restricted import containers, violations
from tests.steps.runs import compose

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
KUBERAY = sorted((DOCKER / "kuberay").glob("ray*.yaml"))
each_manifest = pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)


def checked(*command: str) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def version(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def kuberay_file(name: str) -> Any:
    return yaml.safe_load((DOCKER / "kuberay" / f"{name}.yaml").read_text())


def schema(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())


def ray_templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a RayCluster's or a RayJob's Ray nodes, the head's first."""
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])


def templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of a RayCluster or a RayJob."""
    if manifest["kind"] == "RayJob":
        yield manifest["spec"]["submitterPodTemplate"]
    yield from ray_templates(manifest)


def pods(path: Path) -> list[dict[str, Any]]:
    """The templates as KubeRay starts them: the autoscaler beside the head, and before each worker's container one that
    waits for the head, with that container's image, `env` and securityContext, and resources of its own."""
    manifest = yaml.safe_load(path.read_text())
    head, *workers = ray_templates(manifest)
    options = manifest["spec"].get("autoscalerOptions")
    if options:
        given = {name: options[name] for name in ("env", "resources", "securityContext") if name in options}
        head["spec"]["containers"].append({"name": "autoscaler", **given})
    for worker in workers:
        (main,) = worker["spec"]["containers"]
        waits = {"name": "wait-gcs-ready", "env": main["env"], "securityContext": main["securityContext"]}
        small = {"cpu": "200m", "memory": "256Mi"}
        worker["spec"]["initContainers"] = [waits | {"resources": {"requests": small, "limits": small}}]
    return list(templates(manifest))


def kubernetes_takes(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    kubernetes_validate.validate(pod, "1.33", strict=True)


def test_the_dockerfile_is_clean() -> None:
    checked("hadolint", "docker/Dockerfile")


def test_the_slurm_script_is_clean() -> None:
    checked("shellcheck", "docker/slurm.sh")


@each_manifest
def test_kuberay_takes_the_manifest(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, schema("kuberay"))
    for template in (*templates(manifest), *pods(path)):
        kubernetes_takes(template)


@pytest.mark.parametrize("broken", ["imagePullSecret", "env", "minReplica"])
def test_a_typing_error_in_a_manifest_is_found(broken: str) -> None:
    manifest = kuberay_file("raycluster")
    group = manifest["spec"]["workerGroupSpecs"][0]
    if broken == "minReplica":
        group["minReplica"] = group.pop("minReplicas")
        with pytest.raises(jsonschema.ValidationError, match="minReplica"):
            jsonschema.validate(manifest, schema("kuberay"))
        return
    group["template"]["spec"][broken] = []
    with pytest.raises(kubernetes_validate.ValidationError, match=broken):
        kubernetes_takes(group["template"])


@each_manifest
def test_a_restricted_namespace_accepts_every_pod(path: Path) -> None:
    assert [found for pod in pods(path) for found in violations(pod)] == []


# What the standard refuses: where it is put in the head's pod, and what it is.
REFUSED: list[tuple[str, Any]] = [
    ("spec.hostNetwork", True),
    ("spec.hostPID", True),
    ("spec.hostIPC", True),
    ("spec.volumes.0", {"name": "host", "hostPath": {"path": "/"}}),
    ("spec.volumes.0", {"name": "nfs", "nfs": {"server": "disk", "path": "/"}}),
    ("spec.securityContext.runAsNonRoot", None),
    ("spec.securityContext.runAsNonRoot", False),
    ("spec.securityContext.runAsUser", 0),
    ("spec.securityContext.seccompProfile", None),
    ("spec.securityContext.seccompProfile", {"type": "Unconfined"}),
    ("spec.securityContext.appArmorProfile", {"type": "Unconfined"}),
    ("spec.securityContext.seLinuxOptions", {"type": "spc_t"}),
    ("spec.securityContext.seLinuxOptions", {"user": "system_u"}),
    ("spec.securityContext.windowsOptions", {"hostProcess": True}),
    ("spec.securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    ("metadata.annotations", {"container.apparmor.security.beta.kubernetes.io/ray-head": "unconfined"}),
    ("spec.containers.0.securityContext", None),
    ("spec.containers.0.securityContext.privileged", True),
    ("spec.containers.0.securityContext.allowPrivilegeEscalation", None),
    ("spec.containers.0.securityContext.allowPrivilegeEscalation", True),
    ("spec.containers.0.securityContext.capabilities", None),
    ("spec.containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}),
    ("spec.containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
    ("spec.containers.0.securityContext.procMount", "Unmasked"),
    ("spec.containers.0.securityContext.runAsNonRoot", False),
    ("spec.containers.0.securityContext.runAsUser", 0),
    ("spec.containers.0.securityContext.seccompProfile", {"type": "Unconfined"}),
    ("spec.containers.0.ports.0.hostPort", 6379),
    ("spec.initContainers", [{"name": "first"}]),
    ("spec.ephemeralContainers", [{"name": "beside"}]),
]


@pytest.mark.parametrize(("at", "value"), REFUSED, ids=[f"{at}={value}" for at, value in REFUSED])
def test_what_the_standard_refuses_is_found(at: str, value: Any) -> None:
    pod: Any = copy.deepcopy(next(ray_templates(kuberay_file("raycluster"))))
    assert violations(pod) == []
    *outer, last = at.split(".")
    inner = pod
    for name in outer:
        inner = inner[int(name) if name.isdigit() else name]
    if value is None:
        del inner[last]
    elif last.isdigit():
        inner[int(last)] = value
    else:
        inner[last] = value
    assert violations(pod)


@each_manifest
def test_every_container_says_what_it_needs_and_gets_no_more(path: Path) -> None:
    for pod in pods(path):
        for container in containers(pod["spec"]):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), container["name"]
            assert resources["limits"] == resources["requests"], container["name"]


@each_manifest
def test_pods_take_secrets_from_secrets_alone_and_each_has_the_cluster_token_by_name(path: Path) -> None:
    """By name: KubeRay's container that waits for the head has a worker's `env` and none of its `envFrom`."""
    secret = kuberay_file("secrets")
    kubernetes_validate.validate(secret, "1.33", strict=True)
    name = secret["metadata"]["name"]
    for pod in pods(path):
        for container in containers(pod["spec"]):
            env = {entry["name"]: entry for entry in container["env"]}
            assert len(env) == len(container["env"])
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            token = {"secretKeyRef": {"name": name, "key": "RAY_AUTH_TOKEN"}}
            assert env["RAY_AUTH_TOKEN"]["valueFrom"] == token, container["name"]
            assert container.get("envFrom", []) in ([], [{"secretRef": {"name": name}}])
            assert all("secretKeyRef" in env[one]["valueFrom"] for one in env if names_secret(one))
    assert "RAY_AUTH_TOKEN" in secret["stringData"]


@each_manifest
def test_ray_nodes_keep_weights_in_the_cache_and_need_no_token_of_the_hub(path: Path) -> None:
    claim = kuberay_file("cache")
    kubernetes_validate.validate(claim, "1.33", strict=True)
    for template in ray_templates(yaml.safe_load(path.read_text())):
        (container,) = template["spec"]["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
        (volume,) = [one for one in template["spec"]["volumes"] if "persistentVolumeClaim" in one]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
        caches = [env[name]["value"] for name in ("HF_HOME", "INFSCAN_CACHE")]
        assert all(cache.startswith(f"{mount['mountPath']}/") for cache in caches)
        assert len({*caches}) == 2
        # The group that may write to it.
        assert template["spec"]["securityContext"]["fsGroup"] == template["spec"]["securityContext"]["runAsGroup"]


def test_pods_run_as_the_user_of_the_image() -> None:
    (user,) = re.findall(r"^USER (\d+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for path in KUBERAY:
        for template in templates(yaml.safe_load(path.read_text())):
            assert template["spec"]["securityContext"]["runAsUser"] == int(user)


@each_manifest
def test_prometheus_finds_the_metrics_of_every_ray_node(path: Path) -> None:
    monitor = kuberay_file("podmonitor")
    jsonschema.validate(monitor, schema("podmonitor"))
    wanted = monitor["spec"]["selector"]["matchLabels"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    manifest = yaml.safe_load(path.read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert wanted.items() <= group["template"]["metadata"]["labels"].items()
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert group["rayStartParams"]["metrics-export-port"] == str(ports[endpoint["port"]])


@each_manifest
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
    job = kuberay_file("rayjob")["spec"]
    python, script, *overrides = job["entrypoint"].split()
    assert (python, script) == ("python", "/app/jobs/scan.py")
    config = compose("scan", *overrides)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert config.cluster.num_workers == group["maxReplicas"]
    assert config.cluster.gpus_per_rank == float(requests["nvidia.com/gpu"])
    assert config.cluster.cpus_per_rank < int(requests["cpu"])
    assert "cluster=gpu cluster.num_workers=" in (DOCKER / "slurm.sh").read_text()


def test_the_rayjob_that_the_page_has_one_try_is_taken(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(r"^(sed -E (?:[^\n]|\\\n)*rayjob\.yaml) \| kubectl apply -f -$", page, re.MULTILINE)
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"gpu:|registry|s3:|nodeSelector", made)
    path = tmp_path / "rayjob.yaml"
    path.write_text(made)
    test_kuberay_takes_the_manifest(path)
    test_a_restricted_namespace_accepts_every_pod(path)
    job = yaml.safe_load(made)["spec"]
    config = compose("scan", *job["entrypoint"].split()[2:])
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert (config.cluster.num_workers or 1, group["minReplicas"], group["replicas"]) == (1, 1, 1)
    assert config.cluster.cpus_per_rank < int(requests["cpu"])


def test_ray_itself_restarts_no_rank() -> None:
    """docs/cluster.md explains why: the driver counts attempts and rebuilds the whole group."""
    assert _ACTOR._default_options["max_restarts"] == 0
    assert _ACTOR._default_options["max_task_retries"] == 0
