"""Facts about this machine: who it is, which of its processes live, and whom its kernel killed for memory."""

import os
import platform
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache


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


def process_began(pid: int) -> int:
    """When a process of this machine began, in clock ticks since the machine did; -1 where none runs, or a zombie.

    With it a process is told from a younger one that was given its number. Elsewhere than on Linux: in seconds since
    1970, which shift where the clock is set.
    """
    try:
        # The command's name, in brackets, may hold spaces; 20 fields behind it is the start time (proc(5)). psutil's
        # create_time() adds the time of boot, which two processes may read differently.
        with open(f"/proc/{pid}/stat", "rb") as file:
            status = file.read().rpartition(b")")[2].split()
        return -1 if status[0] in (b"Z", b"X") else int(status[19])
    except (FileNotFoundError, ProcessLookupError):
        pass
    if os.path.exists("/proc/self/stat"):
        return -1
    import psutil

    try:
        process = psutil.Process(pid)
        return -1 if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.Error:
        return -1


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    with suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


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


@lru_cache(maxsize=1)
def processor() -> str:
    """This machine's kind of processor, by name: those of one name give the same bits."""
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def cores() -> int:
    """Cores that this process may use: its affinity's, or what its container is allowed of them."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, min(mine, int(quota) // int(period))) if quota.isdecimal() and period.strip().isdecimal() else mine


def free_host_bytes() -> int:
    """Memory that this process and those it starts may still take: the machine's, or its container's."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    return min(free, max(0, int(limit) - int(used))) if limit.isdecimal() and used.isdecimal() else free
