"""Merge a LoRA adapter into the model that it adapts, as a model folder of its own (it can then be a stage).

python jobs/merge.py adapter=path/to/adapter output=path/to/merged
"""

import shutil
from pathlib import Path

import hydra
from omegaconf import DictConfig
from safetensors.torch import save_file

from infscan.errors import ConfigError
from infscan.model.adapter import merged_files, read_adapter_config
from infscan.model.architecture import model_folder, weight_files
from infscan.telemetry import command, sentences


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    if output.exists():
        raise ConfigError(f"output={output} is there already; give a folder that is not.")
    partial = output.with_name(f".{output.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in merged_files(base, adapter):
        save_file(tensors, partial / name, metadata={"format": "pt"})
    weights = {path.name for path in weight_files(base)}
    for path in base.iterdir():
        if path.suffix in (".json", ".txt", ".model") and path.name not in weights:
            shutil.copy(path, partial)
    partial.rename(output)


@hydra.main(version_base=None, config_path="../conf", config_name="merge")
def main(cfg: DictConfig) -> None:
    with sentences():
        adapter, output = Path(cfg.adapter), Path(cfg.output)
        base = cfg.model or read_adapter_config(adapter).get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{adapter} does not say what it adapts; give model=<folder or hub id>.")
        merge(model_folder(base), adapter, output)
        print(f"merged      {output}")


if __name__ == "__main__":
    command(main)
