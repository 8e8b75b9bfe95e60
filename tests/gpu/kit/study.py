"""Ranks made by hand on any device, over one tiny model, corpus and set of queries: the passes without Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infscan.config import (
    Compression,
    CorpusConfig,
    DampingConfig,
    Dtype,
    Labels,
    ModelConfig,
    Packing,
    QueriesConfig,
    Solver,
)
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.packing import pack_settings
from infscan.corpus.plan import Selection
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import InputSplit
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.precision import Multiply
from infscan.influence.topk_tracker import Thresholds
from infscan.model.architecture import Architecture, describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query, read_queries
from infscan.steps.factor_files import FactorsPlan
from infscan.steps.factors import fit_factors, slice_bounds
from infscan.steps.labels import FitTask
from infscan.steps.preconditioner import Preconditioner, preconditioned
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.steps.refine import pairs_of, score_pairs
from infscan.steps.scan import ScanTask, scan_task
from infscan.storage import Store, expand
from tests.steps.runs import CONTEXT, EOS, VOCAB, tiny_model, token_corpus, token_queries

SHARD = "shard-000000"
QUERIES = 3
SIDES = ("proponent", "opponent")


@dataclass(frozen=True)
class Study:
    """Inputs on disk; what the passes write goes below `folder` too."""

    folder: Path
    architecture: Architecture
    queries: tuple[Query, ...]
    sequences: int = 48
    # Several batches per pass, of different lengths.
    tokens_per_batch: int = 512

    @staticmethod
    def make(
        folder: Path, family: str = "gpt_neox", *, width: int = 64, sequences: int = 48, tokens_per_batch: int = 512
    ) -> Study:
        model = tiny_model(folder / "model", family=family, layers=3, width=width)
        path = token_corpus(folder / "corpus.jsonl", sequences)
        config = CorpusConfig(path=str(path), tokens_field="tokens", packing=Packing.document)
        pack = pack_settings(config, CONTEXT, VOCAB, EOS, EOS)
        store = Store(str(folder / "corpus"))
        (file,) = expand(str(path))
        write_manifest(store, config, pack, None, [prepare_part(InputSplit((file,)), 0, config, pack, None, store)])
        asked = QueriesConfig(str(token_queries(folder / "queries.jsonl", QUERIES)))
        queries = read_queries(asked, None, vocab_size=VOCAB, context=CONTEXT, bos_id=None)
        return Study(folder, describe(str(model), "mlp"), tuple(queries), sequences, tokens_per_batch)

    @property
    def corpus(self) -> CorpusAddress:
        return CorpusAddress(Store(str(self.folder / "corpus")))

    def factors(self, name: str) -> Store:
        return Store(str(self.folder / "factors" / name))

    def rank(self, device: str, dtype: Dtype = Dtype.float32) -> ModelWorker:
        model = ModelConfig(path=self.architecture.folder, dtype=dtype)
        return ModelWorker(WorkerSettings(model, self.architecture.layers, sharded=False), RankContext(device=device))

    def fit_task(self, name: str, labels: Labels, *, draw_labels: bool = False) -> FitTask:
        layers = self.architecture.layers
        plan = FactorsPlan(
            fields={"model": self.architecture.fingerprint},
            layers=layers,
            selection=Selection.of(self.sequences),
            slices=slice_bounds(self.sequences, 2),
            groups=(tuple(layer.name for layer in layers),),
            tokens_per_batch=self.tokens_per_batch,
        )
        return FitTask(self.factors(name), self.corpus, plan, 0, 0, labels, 0, draw_labels)

    def fit(self, rank: ModelWorker, name: str) -> None:
        """Factors of the empirical Fisher: its labels are the corpus's, so that devices have the same."""
        task = self.fit_task(name, Labels.empirical)
        gpus = int(rank.device.startswith("cuda"))
        executor, corpus = InProcessExecutor.on(rank), self.corpus.open()
        fit_factors(executor, task.factors, corpus, task.plan, task.labels, task.seed, gpus=gpus)

    def query_batch(self, rank: ModelWorker, factors: str, compressed: int | None) -> QueryBatch:
        run, name = self.run(rank, compressed), "queries.safetensors"
        inverse = self.inverse(factors)
        how = (compressed, Compression.weighted, "study")
        query_task(rank, QueryTask(run, name, self.queries, self.architecture.layers, inverse, *how))
        return read_query_batch(run, [[name]]).batch

    def scan_task(self, rank: ModelWorker, compressed: int | None, name: str = "") -> ScanTask:
        """The whole corpus as one shard, every row kept. name: of a scan that is to write files of its own."""
        return ScanTask(
            run=self.run(rank, compressed, name),
            corpus=self.corpus,
            shard=SHARD,
            sequence_ids=np.arange(self.sequences),
            query_ids=tuple(query.id for query in self.queries),
            query_batch=f"{compressed}",
            sides=SIDES,
            candidates=self.sequences,
            thresholds=Thresholds.none(len(self.queries)),
            tokens_per_batch=self.tokens_per_batch,
            dense=False,
            fingerprint="study",
        )

    def scores(self, rank: ModelWorker, factors: str, compressed: int | None) -> np.ndarray:
        """[queries, sequences], as the scan wrote them."""
        answer = scan_task(rank, self.scan_task(rank, compressed), self.query_batch(rank, factors, compressed))
        assert answer is not None
        hits, counts = answer
        assert counts.nonfinite == 0
        scores = np.zeros((QUERIES, self.sequences))
        scores[hits.queries, hits.sequence_ids] = hits.scores
        return scores

    def refined(self, rank: ModelWorker, factors: str, matmul: Multiply = "exact") -> np.ndarray:
        """[queries, sequences], as refining scores every pair: layer by layer and token by token, at full rank."""
        layers = self.architecture.layers
        P = preconditioned(rank, self.queries, layers, replace(self.inverse(factors), matmul=matmul))
        wanted = [tuple(range(QUERIES))] * self.sequences
        scores_n = torch.zeros(len(pairs_of(wanted)), dtype=rank.wide, device=rank.device)

        def keep(layer: Layer, pairs_n: Tensor, scores_nt: Tensor) -> None:
            scores_n[pairs_n] += scores_nt.sum(dim=1)

        sequences = rank.read(self.corpus, np.arange(self.sequences))
        score_pairs(rank, sequences, wanted, layers, P, self.tokens_per_batch, keep, matmul)
        return scores_n.view(self.sequences, QUERIES).T.double().cpu().numpy()

    def inverse(self, factors: str) -> Preconditioner:
        return Preconditioner(self.factors(factors), Solver.ekfac, DampingConfig())

    def run(self, rank: ModelWorker, compressed: int | None, name: str = "") -> Store:
        """A store for each scan: a shard's file that is there already stays."""
        place = f"{rank.device}-{rank.model.dtype}-{compressed}{name}".replace(":", "")
        return Store(str(self.folder / "runs" / place))
