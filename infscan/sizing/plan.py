"""What a run would cost, found without running it: no weights, no Ray, a bounded look into the corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from infscan.config import Config, CorpusConfig, fingerprint, plain
from infscan.config.jobs import PlanJob
from infscan.corpus.addressable import AddressableCorpus, is_prepared, open_corpus
from infscan.corpus.describe import describe as describe_arrays
from infscan.corpus.describe import token_files
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.in_place import DESCRIPTION
from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.corpus.splits import InputSplit
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.engine.executor import RankMemory
from infscan.errors import ConfigError
from infscan.model.architecture import Architecture, describe
from infscan.model.suffix import last_blocks
from infscan.model.tracked import by_block
from infscan.queries import read_queries
from infscan.results.read import read_summary
from infscan.sizing.devices import Device, Rates, calibration, device
from infscan.sizing.estimate import Estimate, work_of, writes_of
from infscan.sizing.hosts import host_memory
from infscan.sizing.hours import Rate, rates_of, timed
from infscan.sizing.memory import Codes, pass_costs, run_dtype
from infscan.sizing.pricing import Counted, Dtypes, Pricing
from infscan.sizing.reserve import over_memory
from infscan.sizing.rows import ROW_PHASES, row_costs
from infscan.steps.corpus_inputs import bos_of, settings_for, with_array_settings
from infscan.steps.factor_files import COMPLETE, slice_count
from infscan.steps.factors import slice_bounds
from infscan.steps.inputs import in_dtype
from infscan.steps.plan import few_shards
from infscan.steps.prepare import prepare_here
from infscan.steps.sizes import settled
from infscan.steps.volume import FactorFiles, factor_files, no_room, scan_bytes
from infscan.storage import Store

# Of a corpus that is too large to be read, so many pieces are, spread evenly.
_PIECES = 8
# A sample's lengths are read one by one up to so many tokens.
_MOST_TOKENS_READ = 1 << 24
# A query of which nothing is known: prompt and completion together.
_QUERY_TOKENS = 64


def estimate(config: PlanJob) -> Estimate:
    """The cost of `infscan scan` with the same arguments; with plan.index, of `infscan index`.

    Raises:
        InfscanError: for a model, corpus or queries that the run itself would refuse.
        ConfigError: where there is neither a corpus nor plan.sequences, or, of a scan, neither queries nor
            plan.queries.
    """
    asked = config.plan
    if asked.index:
        config.check_index()
    architecture = describe(
        config.model.path,
        config.model.tracked,
        weights=False,
        attention=config.model.attention_implementation,
        revision=config.model.revision,
    ).with_span(config.factors.span, config.factors.span_from)
    if isinstance(config.scan.sieve, int):
        last_blocks(architecture.layers, config.scan.sieve)
    tokenizer = load_tokenizer(architecture.folder)
    notes: list[str] = []
    scanned, corpus = _count(config, config.corpus, "corpus", architecture, tokenizer)
    fitted = None
    if Store(str(config.factors.path)).exists(COMPLETE):
        notes.append(f"factors are reused from {config.factors.path}")
    else:
        fitted = _fitted(config, scanned, corpus, architecture, tokenizer)
    queries, query_tokens = _queries(config, architecture, tokenizer)
    on_device = device(asked.device) if asked.device else None
    gpus = config.cluster.gpus_per_rank
    gpus = float(on_device is not None) if gpus is None else gpus
    memory = on_device.memory if on_device else None
    config = _settled(config, architecture, queries, gpus, memory)
    if config.searches and queries:
        notes.append(_audit(config, scanned.sequences, queries))
    shard_sequences = config.scan.shard_sequences or default_shard_sequences(scanned.sequences)
    codes = (
        Codes.of(config.index, architecture.layers, min(shard_sequences, scanned.sequences)) if asked.index else None
    )
    costs, blocks = pass_costs(config, architecture, queries, scanned.T, gpus, codes=codes), bool(architecture.block)
    if queries:
        costs |= row_costs(config, architecture.layers, costs, queries, blocks=blocks)
    written = (
        scan_bytes(config, architecture.layers, queries, scanned.sequences, scanned.T, query_tokens=query_tokens)
        if queries or codes is None
        else {}
    )
    if codes is not None:
        written["codes"] = scanned.sequences * codes.row_bytes
        notes.append(
            f"index: {codes.row_bytes:,} bytes a sequence, {codes.code.bits}-bit codes of {len(codes.layers)} layers"
        )
    if said := no_room(f"output={config.output}", written, Store(config.output).free_bytes()):
        notes.append(said)
    if memory and (said := over_memory(costs, memory)):
        notes.append(said)
    planned = Plan("", scanned.sequences, Selection.of(scanned.sequences), shard_sequences)
    shards = planned.num_shards
    if few := few_shards(planned, config.cluster.num_workers or 1):
        notes.append(few)
    dtypes = _dtypes(config, architecture, gpus)
    query_itemsize = in_dtype(config.scan.query_dtype, run_dtype(config, architecture, gpus)).itemsize
    pricing = Pricing(config, architecture.layers, costs, dtypes, architecture.parameters, shards)
    work = work_of(pricing, queries, query_tokens, scanned, fitted, blocks=blocks)
    cluster = config.cluster
    work_timed = timed(work, _rate(config, on_device, dtypes), cluster.num_workers or 1, cluster.ranks_per_worker)
    factors = FactorFiles(0, 0, 0, 0)
    if fitted is not None:
        factors = factor_files(config, architecture.layers, fitted.slices, fitted.tokens)
    kept = written.get("query gradients", 0)
    rows = sum(one.units for one in work if one.name in ROW_PHASES)
    return Estimate(
        parameters=architecture.parameters,
        tracked=len(architecture.layers),
        queries=queries,
        corpus=scanned,
        shards=shards,
        shard_sequences=shard_sequences,
        work=work_timed,
        costs=costs,
        factors=factors,
        bytes=written,
        writes=writes_of(config, architecture.layers, queries, shards, scanned, factors, kept, rows)
        | ({"codes": shards} if codes is not None else {}),
        workers=cluster.num_workers or 1,
        ranks=cluster.ranks_per_worker,
        hosts=host_memory(config, architecture.layers, queries, scanned.T, shards, query_itemsize),
        price_per_hour=asked.price_per_hour,
        notes=(*architecture.warnings, *notes),
        share=sum(layer.size for layer in architecture.layers) / architecture.parameters,
        by_block=tuple(by_block(architecture.layers)),
    )


def _settled(config: PlanJob, architecture: Architecture, queries: int, gpus: float, memory: int | None) -> PlanJob:
    """With the sizes that a run on such a device would have."""
    itemsize = run_dtype(config, architecture, gpus).itemsize
    found = settled(config, architecture, itemsize, queries, None if memory is None else RankMemory(memory))
    assert isinstance(found, PlanJob)
    return found


def _dtypes(config: PlanJob, architecture: Architecture, gpus: float) -> Dtypes:
    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    model, refine = (run_dtype(config, architecture, gpus, refining=refining) for refining in (False, True))
    return Dtypes(name(model), name(refine), name(in_dtype(config.scan.query_dtype, model)), gpus > 0)


def _rate(config: PlanJob, on_device: Device | None, dtypes: Dtypes) -> Rate:
    """What turns work into time: a finished run's rates, one that was given, or the device's, a card's own in place of
    the table's."""
    asked = config.plan
    rates = on_device.rates(asked.utilisation) if on_device else None
    if asked.calibration:
        measured = calibration(asked.calibration).rates
        rates = (rates or Rates({}, {})).known(measured)
    speeds = [rates.model.get(dtype) if rates else None for dtype in (dtypes.model, dtypes.refine)]
    return Rate(
        rates,
        refine_speed=speeds[1] / speeds[0] if speeds[0] and speeds[1] else 1.0,
        tokens_per_s=asked.tokens_per_s,
        measured=rates_of(read_summary(asked.like)) if asked.like else {},
    )


def _queries(config: PlanJob, architecture: Architecture, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """How many queries there are, and their tokens in all."""
    if config.plan.queries is not None:
        return config.plan.queries, config.plan.queries * _QUERY_TOKENS
    if config.plan.index and not config.asks:
        return 0, 0
    if not config.queries.path:
        raise ConfigError("queries.path: no value given. Add queries.path=..., or plan.queries=<how many>.")
    found = read_queries(
        config.queries,
        tokenizer,
        vocab_size=architecture.vocab_size,
        context=architecture.context,
        bos_id=bos_of(config.corpus, architecture, tokenizer),
    )
    return len(found), sum(len(part.token_ids) for query in found for part in query.parts)


def _fitted(
    config: PlanJob, scanned: Counted, corpus: _Seen, architecture: Architecture, tokenizer: Tokenizer | None
) -> Counted:
    """What the factors are fitted on, and how long the sequences of each slice are."""
    factors = config.factors
    if not factors.corpus.same_corpus(config.corpus):
        corpus = _look(config, factors.corpus, f"{config.factors.path}/corpus", architecture, tokenizer)
    whole = corpus.corpus.base if isinstance(corpus.corpus, FilteredCorpus) else corpus.corpus
    total = whole.sequences if isinstance(corpus.corpus, FilteredCorpus) and whole else corpus.sequences
    wanted = min(factors.num_sequences, factors.corpus.max_sequences or factors.num_sequences)
    selection = Selection.of(total, wanted, config.seed, share=factors.corpus.sample)
    count = slice_count(factors.slices, selection.size, architecture.layers, factors.blocks)
    bounds = slice_bounds(selection.size, count)
    if corpus.exact and whole is not None and selection.size * corpus.T <= _MOST_TOKENS_READ:
        lengths = np.asarray([len(sequence) for sequence in whole.read(selection.ids())])
        slices = tuple((stop - start, int(lengths[start:stop].max())) for start, stop in bounds)
        return Counted(selection.size, int(lengths.sum()), int(lengths.max()), corpus.how, slices)
    tokens = round(corpus.tokens * selection.size / max(1, corpus.sequences))
    slices = tuple((stop - start, corpus.T) for start, stop in bounds)
    return Counted(selection.size, tokens, corpus.T, corpus.how, slices)


@dataclass(frozen=True)
class _Seen:
    """A corpus as far as it was looked at. corpus: None where it is only given by its size, or joined of several."""

    corpus: AddressableCorpus | None
    sequences: int
    tokens: int
    T: int
    how: str
    prepared_bytes: int = 0

    @property
    def exact(self) -> bool:
        return self.how == "exact"


def _count(
    config: PlanJob, corpus: CorpusConfig, where: str, architecture: Architecture, tokenizer: Tokenizer | None
) -> tuple[Counted, _Seen]:
    """The scan's selection."""
    seen = _look(config, corpus, f"{config.output}/{where}", architecture, tokenizer)
    chosen = None if seen.corpus is None else seen.corpus.chosen
    total = seen.sequences if chosen is None else seen.corpus.sequences if seen.corpus else seen.sequences
    selection = Selection.of(total, corpus.max_sequences, corpus.seed, chosen, corpus.sample)
    tokens, T, how = round(seen.tokens * selection.size / max(1, total)), seen.T, seen.how
    if selection.size < total and seen.exact:
        if seen.corpus is not None and selection.size * T <= _MOST_TOKENS_READ:
            tokens = sum(len(sequence) for sequence in seen.corpus.read(selection.ids()))
        else:
            how = "exact but for the tokens of the sample"
    return Counted(selection.size, tokens, T, how, prepared_bytes=seen.prepared_bytes), seen


def _audit(config: Config, planned: int, queries: int) -> str:
    """What a search's audit can say at best."""
    audited = config.audited(planned, queries)
    rows = config.audited_tail_rows(planned, queries, audited)
    # Of a share of which none was seen missing in so many, 3 / rows may be, at 95 % confidence; a row may count twice.
    said = f"certify {min(0.999, 1 - 4 / rows):.1%} of them at best" if rows > 8 else "certify nothing"
    return (
        f"the audit of {audited:,} sequences ({audited / max(1, planned):.2%}) is expected to hit {rows:,.0f} of the "
        f"strongest rows of all queries and sides, which {said} (scan.audit_sequences)"
    )


def _look(
    config: PlanJob, corpus: CorpusConfig, where: str, architecture: Architecture, tokenizer: Tokenizer | None
) -> _Seen:
    """A corpus by its counts: of an addressable one exact; of documents read whole where they are small, else a sample
    of them; or as plan.sequences says."""
    if config.plan.sequences is not None:
        T = architecture.sequence_length(corpus.sequence_length)
        return _Seen(None, config.plan.sequences, config.plan.sequences * T, T, "given")
    if corpus.paths:
        several = [
            _look(config, one, f"{where}/{label}", architecture, tokenizer) for label, one in corpus.several.items()
        ]
        how = "exact" if all(seen.exact for seen in several) else "estimated from samples"
        return _Seen(
            None, sum(seen.sequences for seen in several), sum(seen.tokens for seen in several),
            max(seen.T for seen in several), how, sum(seen.prepared_bytes for seen in several),
        )  # fmt: skip
    if not corpus.path:
        raise ConfigError("corpus.path: no value given. Add corpus.path=..., or plan.sequences=<how many>.")
    for path in (corpus.path, where):
        if is_prepared(path):
            return _seen(open_corpus(Store(path), foreign=True))
    pack = settings_for(corpus, architecture, tokenizer)
    # In this process's memory, under the name of its content's address.
    store = Store(f"memory://infscan-plan/{fingerprint([plain(corpus), architecture.fingerprint])[:16]}")
    arrays = token_files(corpus)
    if arrays is not None:
        store.create(DESCRIPTION, json.dumps(describe_arrays(*arrays, corpus, pack).to_json()).encode())
        return _seen(open_corpus(store))
    files = document_files(corpus)
    corpus = with_array_settings(corpus, architecture, tokenizer, files)
    pieces = document_splits(files, corpus)
    share, how = 1.0, "exact"
    if sum(file.size for file in files) > config.plan.sample_bytes:
        corpus = replace(corpus, part_bytes=max(1, config.plan.sample_bytes // _PIECES))
        pieces, share = _spread(document_splits(files, corpus), corpus.part_bytes)
        how = f"estimated from {share:.2%} of the corpus"
    if corpus.deduplicate:
        how, corpus = f"{how}, duplicates not taken out", replace(corpus, deduplicate=False)
    made = prepare_here(corpus, pack, tokenizer, pieces, store)
    return _seen(made, share, how, round(sum(part.bytes for part in made.manifest.parts) / share))


def _seen(corpus: AddressableCorpus, share: float = 1.0, how: str = "exact", prepared_bytes: int = 0) -> _Seen:
    if how == "exact" and corpus.counts.get("tokens", corpus.tokens) is None:
        how = "estimated from the first samples"
    sequences = corpus.sequences if corpus.chosen is None else len(corpus.chosen)
    tokens = round(corpus.tokens * sequences / max(1, corpus.sequences) / share)
    return _Seen(
        corpus if share == 1.0 else None, round(sequences / share), tokens, corpus.sequence_length, how, prepared_bytes
    )


def _spread(pieces: Sequence[InputSplit], part_bytes: int) -> tuple[list[InputSplit], float]:
    """Some pieces from all over the corpus, and the share of its bytes that they are."""

    def weight(piece: InputSplit) -> int:
        if piece.stretch.whole:
            return sum(file.size for file in piece.files)
        stop = piece.stretch.stop
        # The last stretch of a file runs to an end that is not known.
        return part_bytes // 2 if stop is None else stop - piece.stretch.start

    weights = [max(1, weight(piece)) for piece in pieces]
    count = max(1, min(len(pieces), round(_PIECES * part_bytes / (sum(weights) / len(weights)))))
    chosen = np.unique(np.linspace(0, len(pieces) - 1, count).round().astype(int))
    return [pieces[index] for index in chosen], sum(weights[index] for index in chosen) / sum(weights)
