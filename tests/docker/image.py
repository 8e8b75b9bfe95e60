"""Carries a Dockerfile out without a Docker engine: every instruction for real, in a root of its own.

A stage's root is this machine's, seen through an overlay that takes all writes (Linux mount namespaces; root needed).
FROM, ARG, ENV, WORKDIR, COPY, RUN, USER and CMD are known, which is what docker/Dockerfile has.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Where the interpreter of this machine is, in the place of the base image's.
_PYTHON = str(Path(sys.base_prefix) / "bin")
_PATH = f"{_PYTHON}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Tools that a slim image has not; a stage's root has them hidden.
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "make")

# What a base image has not: our folders, compilers, a user 1000; and all may read the interpreter there.
_SLIM = (
    "rm -rf /infscan /app; chmod o+x /root; "
    f"rm -f {' '.join(f'/usr/bin/{name} /usr/bin/{name}-* /usr/local/bin/{name}' for name in COMPILERS)}; "
    'user=$(getent passwd 1000 | cut -d: -f1); [ -z "$user" ] || userdel "$user"'
)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, its words) in order; comments gone, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@dataclass
class Stage:
    """What a stage has become: its folder (which holds the overlay), environment, working folder and user."""

    folder: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"})
    workdir: str = "/"
    user: str = "root"
    args: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True)

    def run(self, script: str, *, binds: dict[Path, str] | None = None) -> str:
        """What `script` prints, run by the stage's user in its root, with folders of this machine bound into it."""
        root = self.folder / "root"
        outer = [
            "set -e",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work {root}",
            f"mount --rbind /proc {root}/proc; mount --rbind /dev {root}/dev; mount --rbind /sys {root}/sys",
            *(f"mkdir -p {root}{to}; mount --bind {path} {root}{to}" for path, to in (binds or {}).items()),
            f"mkdir -p {root}{self.workdir}",
            f"exec chroot --userspec={self.user} {root} /bin/sh -c {shlex.quote(f'cd {self.workdir} && {script}')}",
        ]
        # The package clients' own settings are this machine's; nothing else of its environment is.
        passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        done = subprocess.run(
            ["unshare", "--mount", "/bin/sh", "-c", "\n".join(outer)],
            env=passed | self.args | self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"{script}\n{done.stdout[-4000:]}")
        return done.stdout


def build(dockerfile: Path, context: Path, folder: Path, **args: str) -> Stage:
    """The last stage, every instruction carried out; args: as --build-arg gives them."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for number, (instruction, words) in enumerate(instructions(dockerfile)):
        if instruction == "FROM":
            stage = Stage(folder / f"stage-{number}")
            stages[words.rpartition(" AS ")[2]] = stage
            stage.run(_SLIM)
        elif instruction == "ARG":
            name, _, default = words.partition("=")
            if stage is not None:
                stage.args[name] = args.get(name, default)
        else:
            assert stage is not None
            _carry_out(stage, stages, context, instruction, words)
    assert stage is not None
    return stage


def _carry_out(stage: Stage, stages: dict[str, Stage], context: Path, instruction: str, words: str) -> None:
    if instruction == "ENV":
        for word in shlex.split(words):
            name, _, value = word.partition("=")
            stage.env[name] = value.replace("$PATH", stage.env["PATH"])
    elif instruction == "WORKDIR":
        stage.workdir = words
    elif instruction == "USER":
        stage.user, stage.env["HOME"] = words, "/home/ray"
    elif instruction == "CMD":
        stage.command = json.loads(words)
    elif instruction == "RUN":
        stage.run(words)
    elif instruction == "COPY":
        given = shlex.split(words)
        source, at = context, "/context"
        if given[0].startswith("--from="):
            source = stages[given.pop(0).removeprefix("--from=")].folder / "upper"
        *paths, target = given
        copies = [f"cp -r --no-target-directory {at}/{path.lstrip('/')} {_target(target, path)}" for path in paths]
        parent = target if target.endswith("/") else str(Path(target).parent)
        stage.run(" && ".join([f"mkdir -p {parent}", *copies]), binds={source: at})
    else:
        raise AssertionError(f"{instruction} is not known here")


def _target(target: str, path: str) -> str:
    return f"{target}{Path(path).name}" if target.endswith("/") else target
