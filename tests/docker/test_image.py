"""docker/Dockerfile, all of it carried out; what comes out runs the demo as its own user, without compilers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.image import COMPILERS, Stage, build, instructions

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    return build(DOCKERFILE, ROOT, tmp_path_factory.mktemp("image"))


@slow
@pytest.mark.timeout(1800)
def test_the_image_runs_the_demo_as_its_own_user_without_a_compiler(image: Stage) -> None:
    assert image.run("id -u").strip() == "1000"
    for compiler in COMPILERS:
        image.run(f"! command -v {compiler}")
    said = image.run(
        "RAY_AUTH_MODE=disabled python jobs/scan.py model=demo corpus=demo queries=demo corpus.max_sequences=64 "
        "factors.num_sequences=32 scan.top_k=3 model.sharding=zero3 output=$HOME/answer"
    )
    assert "64 sequences, " in said
    assert image.run("ls $HOME/answer").split()[0] == "_SUCCESS"


@slow
def test_the_image_has_what_kuberay_asks_of_it(image: Stage) -> None:
    """The command line of Ray, and wget for the probes."""
    assert "2.60.0" in image.run("ray --version")
    image.run("wget --version && bash -c true")


def test_what_is_copied_is_in_the_context() -> None:
    """.dockerignore lets through what the Dockerfile copies, and nothing else."""
    let_through = {
        line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        word
        for instruction, words in instructions(DOCKERFILE)
        if instruction == "COPY" and not words.startswith("--from")
        for word in words.split()[:-1]
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
