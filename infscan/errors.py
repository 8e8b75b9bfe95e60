"""The errors a person can cause and fix.

Every message names the value, the reason and the fix, in one or two sentences. Jobs print them without a
traceback and exit with status 2; a bug (an assertion, a TypeError) keeps its traceback.
"""


class InfscanError(Exception):
    """Base of every error that a user can fix."""


class ConfigError(InfscanError):
    """A setting that is unknown, impossible or at odds with another one."""


class StorageError(InfscanError):
    """A folder or object that cannot be read or written: missing, refused, full, unreachable.

    passes: the store was busy, broken or out of reach; the same request may succeed later.
    """

    transient = False


class UnwritableError(StorageError):
    """A place that takes no writes now (full, over its quota, read-only, refused): another attempt does not fix it."""


class DamagedError(StorageError):
    """A file that infscan wrote and that does not hold what was written; names it, and what to remove or restore."""


class CorpusError(InfscanError):
    """A corpus that is missing, empty, malformed or changed; names the file and the line or row."""


class ChangedCorpusError(CorpusError):
    """A corpus, or a file of it, that is not the one that the run was planned with: no other attempt fixes it."""


class BadDocumentError(CorpusError):
    """One document that cannot be used; as many as corpus.allow_bad_documents may be left out, counted by `reason`."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class BadFileError(CorpusError):
    """A corpus file that cannot be read to its end; as many as corpus.allow_bad_files may be left out, whole."""


class QueryError(InfscanError):
    """A query file or a query in it that cannot be measured; names the line and the id."""


class ModelError(InfscanError):
    """A model folder that cannot be loaded, or a layer that cannot be tracked."""


class FactorsError(InfscanError):
    """Factors that do not belong to this model and corpus, or that are not finite."""


class RunError(InfscanError):
    """A run folder that belongs to another configuration, is held by another driver, or is not finished."""
