"""Kubernetes' Pod Security standard "restricted", as of version 1.33: what a namespace under it refuses a pod for.

By its rules as kubernetes.io/docs/concepts/security/pod-security-standards lists them, those of "baseline" included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_PROFILES = {"RuntimeDefault", "Localhost"}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
}
_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All of a pod's, those that run before it and beside it included."""
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [container for kind in kinds for container in spec.get(kind, [])]


def violations(template: dict[str, Any]) -> list[str]:
    """The fields of a pod template that the standard refuses, each with the container's name or `pod`."""
    return [
        *_of_pod(template),
        *(found for one in containers(template["spec"]) for found in _of(one, template["spec"])),
    ]


def _of_pod(template: dict[str, Any]) -> Iterator[str]:
    spec = template["spec"]
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"pod: {name}"
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"pod: volume {volume['name']}"
    context = spec.get("securityContext", {})
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield f"pod: sysctl {sysctl['name']}"
    if context.get("runAsUser") == 0:
        yield "pod: runAsUser"
    yield from (f"pod: {name}" for name in _of_either(context))
    for name, value in template.get("metadata", {}).get("annotations", {}).items():
        if name.startswith(_APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"pod: annotation {name}"


def _of_either(context: dict[str, Any]) -> Iterator[str]:
    """What pod and container may say of themselves, and what they may not."""
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in _SELINUX or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "windowsOptions.hostProcess"
    for name in ("seccompProfile", "appArmorProfile"):
        if context.get(name, {"type": "RuntimeDefault"}).get("type") not in _PROFILES:
            yield name


def _of(container: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    own, pod, name = container.get("securityContext", {}), spec.get("securityContext", {}), container["name"]
    capabilities = own.get("capabilities", {})
    refused = {
        "privileged": own.get("privileged"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "capabilities.drop": "ALL" not in capabilities.get("drop", []),
        "capabilities.add": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
        "procMount": own.get("procMount", "Default") != "Default",
        "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True,
        "runAsUser": own.get("runAsUser") == 0,
        "seccompProfile missing": not (own.get("seccompProfile") or pod.get("seccompProfile")),
        "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
    }
    yield from (f"{name}: {field}" for field, bad in refused.items() if bad)
    yield from (f"{name}: {field}" for field in _of_either(own))
