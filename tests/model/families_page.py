"""docs/families.md: every family of the zoo, built small, loaded, and its scores held against plain autograd.

python -m tests.model.families_page > docs/families.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from infscan.config import Attention, CorpusConfig, Dtype, ModelConfig
from infscan.errors import ModelError
from infscan.model.architecture import Architecture, describe
from infscan.model.loaded import RankContext, check_document_mask
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.steps.corpus_inputs import settings_for
from tests.model import zoo
from tests.model.against_autograd import worst_error

TRACKED = ("mlp", "attention", "head")
# In float64; parts of some families (norms, rotary tables, state spaces) run in float32 whatever is asked for.
CLOSE = 1e-5
# transformers' own code overflows in float64.
FLOAT32 = {"xglm": 1e-3}

_HEAD = """# Families

Every family below was built small with random weights, saved, loaded by infscan as a user's model is, and its scores
were held against plain autograd, each sequence alone: to 1e-5 of a layer's largest score, in float64. A slow test
(`tests/model/test_families.py`) makes this page again and compares. A family that is not here may well work: infscan
tries every model on a few tokens when it loads it, and refuses by name what it would get wrong.

- **mlp**, **attention**, **head**: `model.tracked`. `right`: as autograd says, experts of a mixture expert by expert;
  `none`: the family has no such layer; else why it is refused.
- **within**: whether documents of one sequence can be kept apart (`corpus.attention=within`). A family that carries a
  state from token to token cannot, nor one whose code does not take position ids for boundaries.
- **left out**: linear layers that the model does not run as layers on text (used by weight, or of no use there). They
  are not tracked, and a run says so.

Of a wrapper with other towers (vision, audio) the text tower is scanned. Quantised checkpoints are refused.

| family | mlp | attention | head | within | left out |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    family: str
    tracked: tuple[str, ...]
    within: str
    left_out: str

    def __str__(self) -> str:
        return f"| {' | '.join((self.family, *self.tracked, self.within, self.left_out))} |\n"


def row(family: str, folder: Path) -> Row:
    """What the page says of a family, found now."""
    path = _saved(family, folder)
    found = [_tracked(family, path, tracked) for tracked in TRACKED]
    known = next((architecture for _, architecture in found if architecture), None)
    left_out = [name for _, architecture in found if architecture for name in architecture.left_out]
    return Row(family, tuple(said for said, _ in found), _within(path, known), str(len(left_out) or ""))


def _saved(family: str, folder: Path) -> Path:
    if family in zoo.NO_LANGUAGE_MODELS:
        (folder / family).mkdir()
        (folder / family / "config.json").write_text(json.dumps(zoo.configuration(family).to_dict()))
        # Never read: the configuration says enough.
        (folder / family / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        return folder / family
    return zoo.save(family, folder)


def _tracked(family: str, path: Path, tracked: str) -> tuple[str, Architecture | None]:
    dtype = Dtype.float32 if family in FLOAT32 else Dtype.float64
    try:
        architecture = describe(str(path), tracked)
        settings = WorkerSettings(ModelConfig(str(path), dtype), architecture.layers, sharded=False)
        error = worst_error(ModelWorker(settings, RankContext()))
    except ModelError as error:
        return ("none" if "matches no linear layer" in str(error) else f"refused: {_reason(error)}"), None
    limit = FLOAT32.get(family, CLOSE)
    return "right" if error < limit else f"WRONG by {error:.0e}", architecture


def _reason(error: ModelError) -> str:
    return str(error).partition(";")[0].replace("|", "/")


def _within(path: Path, architecture: Architecture | None) -> str:
    if architecture is None:
        return "refused"
    corpus = CorpusConfig(path="", eos_id=1, sequence_length=8, attention=Attention.within)
    try:
        settings_for(corpus, architecture, None)
        settings = WorkerSettings(ModelConfig(str(path)), architecture.layers, sharded=False)
        check_document_mask(ModelWorker(settings, RankContext()).model)
    except ModelError:
        return f"refused ({architecture.recurrent})" if architecture.recurrent else "refused"
    return "yes"


def page() -> str:
    with TemporaryDirectory() as folder:
        return _HEAD + "".join(str(row(family, Path(folder))) for family in sorted(zoo.FAMILIES))


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.stdout.write(page())
