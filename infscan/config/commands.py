"""The commands of infscan: what each reads, what it runs, and how its settings are composed by Hydra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from infscan.config.identity import leaves, plain
from infscan.config.schema import Config
from infscan.config.settings import Setting, settings_of
from infscan.errors import ConfigError

# In a checkout conf/ is beside the package; in a wheel it is inside.
_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())


@dataclass(frozen=True, eq=False)
class Command:
    """One command: `infscan <name>`, `python jobs/<name>.py`, `infscan.<name>(...)`.

    Names of modules stand for what is imported only when it is needed: help and a slip bring neither torch nor Ray.
    """

    name: str
    summary: str
    # "module:class" of its settings, and "module:function" of settings -> a result that has `show()`.
    settings: str
    run: str
    # Presets that it can start from (folders of conf/), and those that it does start from.
    groups: tuple[str, ...] = ()
    presets: Mapping[str, str] = field(default_factory=dict)
    # Values that differ from the settings' defaults.
    values: Mapping[str, Any] = field(default_factory=dict)
    # Mandatory keys that it does not read.
    unused: tuple[str, ...] = ()
    # Keys, or beginnings of keys, that its help shows; all where empty.
    shows: tuple[str, ...] = ()
    # What words without `=` stand for, in order.
    positional: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    # Presets defined in code: group -> name -> "module:class".
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def kind(self) -> type:
        return _load(self.settings)

    @property
    def is_run(self) -> bool:
        """Whether its settings are those of a run: inherited, checked, with an output that a sweep's cells share."""
        return issubclass(self.kind, Config)

    @property
    def folder(self) -> str:
        """Where its presets are. One without presets gets a folder without: a key may then have a group's name
        (`merge model=`)."""
        return str(CONF if self.groups else Path(__file__).parent)

    @property
    def function(self) -> Callable[[Any], Any]:
        return _load(self.run)

    @cached_property
    def all_settings(self) -> dict[str, Setting]:
        """Every setting that it takes by key, those of its variants included."""
        kinds = [("", self.kind)]
        kinds += [(f"{group}.", _load(kind)) for group, named in self.variants.items() for kind in named.values()]
        found: dict[str, Setting] = {}
        for prefix, kind in kinds:
            for setting in settings_of(kind, prefix):
                found.setdefault(setting.key, setting)
        return found

    def preset_settings(self) -> Iterator[tuple[str, str, list[Setting]]]:
        """Each preset that is defined in code: its name (`study=layers`), its meaning, and the settings that it has."""
        for group, named in self.variants.items():
            for name, kind in named.items():
                loaded = _load(kind)
                meaning = " ".join((loaded.__doc__ or "").split("\n\n")[0].split())
                yield f"{group}={name}", meaning, list(settings_of(loaded, f"{group}."))

    def options(self, group: str, folders: Sequence[Path] = ()) -> list[str]:
        """The presets of a group, those in folders of the user's own included."""
        files = (path.stem for folder in (CONF, *folders) for path in (folder / group).glob("*.yaml"))
        return sorted({*files, *self.variants.get(group, {})})


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


_RUN_GROUPS = ("model", "corpus", "queries", "factors", "scan", "cluster", "stages")
_SCHEMA, _JOBS, _API = "infscan.config.schema", "infscan.config.jobs", "infscan.api"
_CORE = (
    Command(
        name="scan",
        summary="Find the sequences of a corpus that most raised (or lowered) the probability of each completion.",
        settings=f"{_SCHEMA}:Config",
        run=f"{_API}:run_scan",
        groups=_RUN_GROUPS,
        values={"output": "runs/scan"},
        examples=(
            "model=demo corpus=demo queries=demo output=runs/demo",
            "model.path=EleutherAI/pythia-70m corpus.path=data/ queries.path=queries.jsonl output=runs/mine",
            "model=demo corpus=demo prompt='The capital of France is' completion=' Paris' output=runs/one",
            "-m model=pythia-70m,pythia-160m corpus.path=data/ queries.path=queries.jsonl output=runs/sweep",
        ),
    ),
    Command(
        name="plan",
        summary="Say what a scan or an index would cost (work, hours, memory, bytes, money) before anything runs.",
        settings=f"{_JOBS}:PlanJob",
        run=f"{_API}:run_plan",
        groups=_RUN_GROUPS,
        values={"output": "runs/scan"},
        unused=("corpus.path", "factors.corpus.path", "queries.path"),
        examples=(
            "model=pythia-1b corpus.path=s3://bucket/pile/ queries.path=queries.jsonl plan.device=h100",
            "model=pythia-1b corpus.path=s3://bucket/pile/ plan.index=true index.width=64 plan.device=h100",
            "model=shape-52b plan.sequences=10000000 plan.queries=100 plan.device=h100 cluster.ranks_per_worker=8",
        ),
    ),
    Command(
        name="prepare",
        summary="Tokenise, pack and number a corpus into <output>/corpus, for any number of scans.",
        settings=f"{_SCHEMA}:Config",
        run=f"{_API}:run_prepare",
        groups=("model", "corpus", "cluster"),
        values={"output": "runs/prepare"},
        unused=("queries.path",),
        shows=("model.path", "corpus.", "cluster.", "output"),
        examples=(
            "model=pythia-70m corpus.path='data/*.jsonl.zst' output=s3://bucket/pile",
            "model=pythia-70m corpus.path=tokens/ corpus.in_place=false corpus.deduplicate=true output=runs/corpus",
        ),
    ),
    Command(
        name="fit",
        summary="Fit EK-FAC factors and put them at factors.path, for scans to reuse.",
        settings=f"{_SCHEMA}:Config",
        run=f"{_API}:run_fit",
        groups=("model", "corpus", "factors", "scan", "cluster"),
        values={"output": "runs/fit"},
        unused=("queries.path",),
        shows=("model.", "corpus.", "factors.", "scan.tokens_per_batch", "cluster.", "output", "seed"),
        examples=("model=pythia-70m corpus.path=s3://bucket/corpus factors.path=s3://bucket/factors/pythia-70m",),
    ),
    Command(
        name="tfidf",
        summary="Keep the sequences that share rare tokens with a query (the TF-IDF filter of Grosse et al. 2023).",
        settings=f"{_JOBS}:TfidfJob",
        run=f"{_API}:run_tfidf",
        groups=("model", "corpus", "queries", "cluster"),
        values={"output": "runs/tfidf"},
        shows=("model.path", "corpus.", "queries.", "tfidf.", "cluster.", "output", "seed"),
        examples=("model=pythia-1b corpus.path=s3://bucket/pile queries.path=queries.jsonl output=runs/filter",),
    ),
    Command(
        name="index",
        summary="Keep a code of every sequence's gradient, so that later questions need no scan (docs/index-ask.md).",
        settings=f"{_JOBS}:IndexJob",
        run=f"{_API}:run_index",
        groups=("model", "corpus", "queries", "factors", "scan", "cluster"),
        values={"output": "runs/index"},
        unused=("queries.path",),
        shows=(
            "model.",
            "corpus.",
            "queries.",
            "factors.",
            "index.",
            "scan.",
            "cluster.",
            "output",
            "seed",
        ),
        examples=(
            "model=demo corpus=demo output=runs/index",
            "model=demo corpus=demo queries=demo output=runs/both",
            "model.path=path/to/hf-model corpus.path=s3://bucket/corpus factors.path=s3://bucket/factors "
            "output=s3://bucket/index",
        ),
    ),
    Command(
        name="ask",
        summary="Answer questions from an index: only the rows that it finds are read again, and scored exactly.",
        settings=f"{_JOBS}:AskJob",
        run=f"{_API}:run_ask",
        # No presets: its own keys have their groups' names.
        groups=(),
        positional=("index",),
        examples=(
            "index=runs/index queries=queries.jsonl output=runs/answer",
            "runs/index prompt='The capital of France is' completion=' Paris' output=runs/paris",
        ),
    ),
    Command(
        name="duplicates",
        summary="List near-duplicates in gradient space: sequences of an index that would move every completion alike.",
        settings=f"{_JOBS}:DuplicatesJob",
        run=f"{_API}:run_duplicates",
        positional=("index",),
        examples=("runs/index", "runs/index similar=0.95 output=duplicates.parquet"),
    ),
    Command(
        name="serve",
        summary="Answer questions from an index over HTTP, with a page for a browser, until it is ended.",
        settings=f"{_JOBS}:ServeJob",
        run=f"{_API}:run_serve",
        positional=("index",),
        examples=("runs/index", "index=s3://bucket/index port=8300 output=s3://bucket/answers threads=8"),
    ),
    Command(
        name="explain",
        summary="Take scores apart by layer and by token: rows of a finished run, or any text.",
        settings=f"{_JOBS}:ExplainJob",
        run=f"{_API}:run_explain",
        groups=("cluster",),
        positional=("run",),
        examples=(
            "runs/demo query_ids=[astrobia] rows=2",
            "runs/demo query_ids=[astrobia] name=mine text='The President of Astrobia was Zorlad Pfaff.'",
        ),
    ),
    Command(
        name="masks",
        summary="Export masks of the loss: the tokens of explained rows that teach the model a completion most.",
        settings=f"{_JOBS}:MasksJob",
        run=f"{_API}:run_masks",
        positional=("run",),
        examples=("runs/demo share=0.01", "runs/demo query_ids=[astrobia] tokens=20 output=astrobia.parquet"),
    ),
    Command(
        name="report",
        summary="Write the page that people read, report.html, of a run, of a sweep's folder, or of several runs.",
        settings=f"{_JOBS}:ReportJob",
        run=f"{_API}:run_report",
        positional=("run",),
        examples=("runs/demo", "run=[runs/demo,runs/demo-dot-product] output=compared.html"),
    ),
    Command(
        name="merge",
        summary="Merge a LoRA adapter into the model that it adapts, as a model folder of its own.",
        settings=f"{_JOBS}:MergeJob",
        run=f"{_API}:run_merge",
        examples=(
            "adapter=path/to/adapter output=path/to/merged",
            "adapter=s3://bucket/adapter model=path/to/base output=s3://bucket/merged",
        ),
    ),
    Command(
        name="status",
        summary="Show how far a run or a sweep is, also while it goes on; nothing is written.",
        settings=f"{_JOBS}:StatusJob",
        run=f"{_API}:run_status",
        positional=("run",),
        examples=("runs/demo", "s3://bucket/runs/pile --json"),
    ),
    Command(
        name="verify",
        summary="Read every file of a finished run or index and hold it to what was committed; nothing is written.",
        settings=f"{_JOBS}:VerifyJob",
        run=f"{_API}:run_verify",
        positional=("run",),
        examples=("runs/demo", "s3://bucket/runs/pile"),
    ),
)


@cache
def commands() -> dict[str, Command]:
    """Every command by name: infscan's own, then those of installed packages (entry points `infscan.commands`)."""
    found = {command.name: command for command in _CORE}
    for entry in sorted(entry_points(group="infscan.commands"), key=lambda entry: entry.name):
        found |= {command.name: command for command in entry.load()}
    return found


def command_of(name: str) -> Command:
    """Raises ConfigError for a command that there is not."""
    if name not in commands():
        raise ConfigError(f"{name}: there is no such command; infscan --help lists those that there are.")
    return commands()[name]


def register(command: Command) -> str:
    """Hand the command's settings to Hydra, in place of another's of this name; returns its primary config's name."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    schema = f"{command.name}_schema"
    store.store(name=schema, node=command.kind)
    for group, named in command.variants.items():
        for name, kind in named.items():
            store.store(group=group, name=name, node=_load(kind))
    defaults: list[Any] = [schema]
    for group in (*command.groups, *command.variants):
        defaults.append({group: command.presets.get(group)})
    defaults += ["_self_", {"override hydra/job_logging": "none"}]
    node = {"defaults": defaults, **_nested(command.values), "hydra": _HYDRA | {"job": {"name": command.name}}}
    store.store(name=f"infscan_{command.name}", node=node)
    return f"infscan_{command.name}"


# Hydra writes no log and no copy of the settings: a run keeps its own. Of a sweep it keeps a record (`cli._sweep`).
_HYDRA: dict[str, Any] = {
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "multirun/${now:%Y-%m-%dT%H-%M-%S}", "subdir": "."},
}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        group = found
        *above, name = key.split(".")
        for part in above:
            group = group.setdefault(part, {})
        group[name] = value
    return found


@contextmanager
def _hydra(folder: str) -> Iterator[None]:
    """Hydra, opened at a folder of presets; one that a notebook has open is put back."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(folder, version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def compose(command: Command, overrides: Sequence[str]) -> Any:
    """The settings that Hydra composes of a command's defaults, presets and overrides (a DictConfig).

    Raises:
        ConfigError: in one sentence, for whatever Hydra refuses.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from infscan.config.arguments import refusal

    with _hydra(command.folder):
        try:
            return hydra_compose(register(command), list(overrides))
        except (HydraException, OmegaConfBaseException, AssertionError, ValueError, RecursionError) as error:
            raise refusal(command, overrides, error) from None


def structured(settings: Any) -> Any:
    """Typed settings as a DictConfig, to be settled as composed ones are.

    Raises:
        ConfigError: for a text that would not be taken as it is.
    """
    from omegaconf import OmegaConf

    from infscan.config.arguments import check_text

    for key, value in leaves(plain(settings)):
        check_text(key, value)
    return OmegaConf.structured(settings)


def assign(command: Command, cfg: Any, key: str, value: Any) -> None:
    """Set one key of a DictConfig.

    Raises:
        ConfigError: for a value that the key cannot have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from infscan.config.arguments import check_text, refusal

    check_text(key, value)
    try:
        OmegaConf.update(cfg, key, value, force_add=True)
    except OmegaConfBaseException as error:
        raise refusal(command, [f"{key}={value}"], error) from None


def settle(command: Command, cfg: Any, cell: str | None = None) -> Any:
    """Composed settings as the command's typed and checked ones."""
    from infscan.config.compose import from_hydra, parse_job

    if command.is_run:
        return from_hydra(cfg, command.unused, cell)
    return parse_job(cfg, command.kind)
