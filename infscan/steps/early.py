"""What can be wrong with a command's files, found before torch and Ray are imported: a slip is answered at once."""

from __future__ import annotations

from pathlib import Path

from infscan.config import Config
from infscan.corpus.addressable import is_prepared
from infscan.corpus.documents import data_and_beside
from infscan.model.folder import may_be_hub_id, model_folder
from infscan.queries import check_rows
from infscan.storage import is_uri


def check_files(config: Config) -> None:
    """Look at the query file's rows, and at what is on this machine of the model and the corpora.

    Nothing is downloaded or listed in a store, and no tokenizer is asked: the run looks at all of it again.

    Raises:
        InfscanError: for what is missing, or is no query.
    """
    is_local = Path(config.model.path).expanduser().exists() or not may_be_hub_id(config.model.path)
    if is_local and not is_uri(config.model.path):
        model_folder(config.model.path, weights=False)
    if config.queries.path or config.queries.prompt is not None:
        check_rows(config.queries)
    for corpus in (config.corpus, config.factors.corpus):
        for one in corpus.several.values() if corpus.paths else [corpus]:
            if one.path and not is_uri(one.path) and not is_prepared(one.path):
                data_and_beside(one)
