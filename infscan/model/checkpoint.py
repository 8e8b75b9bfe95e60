"""A checkpoint's tensors under the names that the installed transformers runs them by, one parameter at a time.

The sharded loader reads by this what `from_pretrained` reads for a whole model: renamed, converted (a mixture's experts
are stored one by one, and run stacked), tied or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import LoadStateDictInfo

from infscan.errors import ModelError
from infscan.model.architecture import weight_files


@dataclass
class Checkpoint:
    """What a checkpoint holds for a model, found from its keys alone; `tensors` reads it."""

    folder: Path
    module: PreTrainedModel
    # By the (first) name that it becomes, what is read and how it is converted.
    sources: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)
    # By source pattern.
    converters: dict[str, WeightConverter] = field(default_factory=dict)

    @staticmethod
    def of(folder: Path, module: PreTrainedModel) -> Checkpoint:
        """module: the model on the meta device."""
        mapping = get_model_conversion_mapping(module)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found = Checkpoint(folder, module)
        found.converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        names, prefix = module.state_dict(), module.base_model_prefix
        with ExitStack() as stack:
            files = _open(folder, stack)
            for key in sorted(files, key=dot_natural_key):
                name, pattern = rename_source_key(key, renamings, converters, prefix, names)
                if name not in names and key in names:
                    name, pattern = rename_source_key(key, [], [], prefix, names)
                if name in names:
                    found.sources.setdefault(name, []).append((key, pattern))
                else:
                    found.unexpected.add(name)
        return found

    def untied(self) -> list[tuple[str, str]]:
        """Pairs of names that the configuration ties, and for which the checkpoint brings two different tensors."""
        pairs = self.module.all_tied_weights_keys.items()
        both = [(target, source) for target, source in pairs if target in self.sources and source in self.sources]
        if not both:
            return []
        with ExitStack() as stack:
            files = _open(self.folder, stack)
            brought = {
                name: tensor
                for wanted in {name for pair in both for name in pair}
                for name, tensor in self._converted(wanted, self.sources[wanted], files)
            }
        return [(target, source) for target, source in both if not torch.equal(brought[target], brought[source])]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that the model has a place for, one parameter's sources read at a time.

        Raises:
            ModelError: where tensors cannot be converted to how the family is run.
        """
        with ExitStack() as stack:
            files = _open(self.folder, stack)
            for name, sources in self.sources.items():
                yield from self._converted(name, sources, files)

    def _converted(
        self, name: str, sources: list[tuple[str, str | None]], files: dict[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        if sources[0][1] is None:
            yield name, files[sources[0][0]].get_tensor(sources[0][0])
            return
        info = _nothing_yet()
        converter = deepcopy(self.converters[sources[0][1]])
        for key, pattern in sources:
            assert pattern is not None
            converter.add_tensor(name, key, pattern, files[key].get_tensor(key))
        try:
            made = converter.convert(name, model=self.module, config=self.module.config, loading_info=info)
        except Exception as error:  # transformers marks what it could not convert by an exception of its own
            reason = next(iter(info.conversion_errors.values()), str(error))
            raise ModelError(
                f"{self.folder}: {sources[0][0]} cannot be converted to {name} ({str(reason).splitlines()[0]}); save "
                "the model again with the installed transformers."
            ) from None
        for made_name, tensor in made.items():
            yield made_name, tensor[0] if isinstance(tensor, list) else tensor

    def refusable(self, filled: set[str]) -> tuple[set[str], set[str]]:
        """Names that are missing and unexpected, but for those that the family itself says do not matter."""
        info = _nothing_yet()
        info.missing_keys = set(self.module.state_dict()) - filled
        info.unexpected_keys = set(self.unexpected)
        self.module._adjust_missing_and_unexpected_keys(info)
        return info.missing_keys, info.unexpected_keys


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file that each key is in."""
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        file = stack.enter_context(safe_open(path, framework="pt"))
        files |= dict.fromkeys(file.keys(), file)
    return files


def _nothing_yet() -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
