"""What this machine says of itself, where no library does: who it is, and whom its kernel killed for their memory."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A machine and the view that this process has of its processes; equal where process ids mean the same process.

    boot: changes when the machine starts anew. processes: the namespace of process ids (a container has its own).
    """

    name: str
    boot: str
    processes: str


def this_host() -> Host:
    processes = ""
    with suppress(OSError):
        processes = os.readlink("/proc/self/ns/pid")
    return Host(socket.gethostname(), _text("/proc/sys/kernel/random/boot_id").strip(), processes)


def oom_kills() -> int:
    """Processes that the kernel killed so far because memory ran out: in this container's group, else on this machine.

    0 where the kernel does not count them (it is not Linux, or an old one).
    """
    counters = (
        ("/sys/fs/cgroup/memory.events", "oom_kill"),
        ("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
        ("/proc/vmstat", "oom_kill"),
    )
    for path, name in counters:
        for line in _text(path).splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
