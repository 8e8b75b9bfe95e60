"""G23's studies on a finished run: a table, a figure, and what they say and cannot say.

python jobs/study.py study=sparsity run=runs/demo      # the tail of the scores (scan.scores=all)
python jobs/study.py study=layers   run=runs/demo      # which layers carry the published rows' scores
python jobs/study.py study=memorisation run=runs/demo  # rows that hold the completion word for word
python jobs/study.py study=word_order run=runs/demo study.texts=runs/facts/texts.jsonl   # after jobs/facts.py
python jobs/study.py study=models run=runs/small 'study.runs=[runs/large]'               # the same queries and corpus
python jobs/study.py study=cross_lingual run=runs/demo study.pairs=pairs.jsonl           # queries and translations
python jobs/study.py study=side_by_side run=runs/small 'study.runs=[runs/large]'         # role-play, arithmetic, code
python jobs/study.py study=extrapolation run=runs/sample study.filtered=runs/filtered    # TF-IDF against no filter
Word order of *planted* facts has a job of its own: jobs/word_order.py.
"""

from collections.abc import Callable
from typing import Any

import hydra
import pyarrow as pa
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import absolute, of_finished, plain
from infscan.report.figures import (
    Draw,
    draw_cross_lingual,
    draw_extrapolation,
    draw_layers,
    draw_memorisation,
    draw_models,
    draw_side_by_side,
    draw_sparsity,
    draw_word_order,
    write_figure,
)
from infscan.results.schema import to_parquet
from infscan.storage import Store
from infscan.studies import (
    cross_lingual,
    extrapolation,
    layers,
    memorisation,
    models,
    partitions,
    side_by_side,
    sparsity,
)
from infscan.studies.asked import SCHEMAS, SideBySideConfig, Study, StudyJob
from infscan.telemetry import command, sentences

ConfigStore.instance().store(name="study_schema", node=StudyJob)
for schema in SCHEMAS:
    ConfigStore.instance().store(group="study", name=f"{schema.name.value}_schema", node=schema)
# (run, its settings, seed) -> table; table -> what it says; figure, table -> drawn
STUDIES: dict[Study, tuple[Callable[[str, Any, int], pa.Table], Callable[[pa.Table], list[str]], Draw]] = {
    Study.sparsity: (sparsity.study, sparsity.words, draw_sparsity),
    Study.layers: (layers.study, layers.words, draw_layers),
    Study.word_order: (partitions.study, partitions.words, draw_word_order),
    Study.memorisation: (memorisation.study, memorisation.words, draw_memorisation),
    Study.models: (models.study, models.words, draw_models),
    Study.cross_lingual: (cross_lingual.study, cross_lingual.words, draw_cross_lingual),
    Study.side_by_side: (side_by_side.study, side_by_side.words, draw_side_by_side),
    Study.extrapolation: (extrapolation.study, extrapolation.words, draw_extrapolation),
}


@hydra.main(version_base=None, config_path="../conf", config_name="study")
def main(cfg: DictConfig) -> None:
    with sentences():
        job = of_finished(cfg, StudyJob)
        job.run = absolute(job.run)
        job.study.check()
        study, words, draw = STUDIES[job.study.name]
        table = study(job.run, job.study, job.seed)
        store, name = Store(job.folder), job.study.name.value
        store.write(f"{name}.parquet", to_parquet(table, {"study": plain(job)}))
        written = write_figure(store, name, draw, table)
        if isinstance(job.study, SideBySideConfig):
            text = side_by_side.page(table.to_pylist(), side_by_side.read_asked(job.run, job.study))
            store.write(f"{name}.md", text.encode())
            written.append(f"{name}.md")
        for line in words(table):
            print(line)
        print(f"\n{store.uri}/: {name}.parquet, {', '.join(written)}")


if __name__ == "__main__":
    command(main)
