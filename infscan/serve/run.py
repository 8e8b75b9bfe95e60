"""`infscan serve`: one process that holds model, factors and index, and answers over HTTP until it is ended."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from infscan.config.jobs import ServeJob
from infscan.errors import ConfigError
from infscan.serve.desk import Desk, check_asked
from infscan.serve.server import Server
from infscan.steps.ask import ask_config, read_indexes

log = logging.getLogger("infscan")

TOKEN = "INFSCAN_SERVE_TOKEN"
_LEAST_TOKEN = 16


@contextmanager
def serving(job: ServeJob) -> Iterator[Server]:
    """A server at work, in threads of this process; what is being asked is finished at the end, unless that is
    interrupted too.

    Raises:
        ConfigError: where it is to listen beyond this machine without a token, or where it cannot listen.
    """
    token = _token(job)
    found = read_indexes(job.asking().indexes)
    desk = Desk(found, ask_config(found, job.asking()), job)
    check_asked(desk.inputs)
    try:
        server = Server(desk, job, token)
    except OSError as error:
        raise ConfigError(
            f"host={job.host} port={job.port}: cannot listen there ({error.strerror or error}); give another port=, or "
            "port=0 for a free one."
        ) from None
    threads = [threading.Thread(target=desk.work, name="desk"), threading.Thread(target=server.serve_forever)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        desk.stop()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            desk.abandon()
            for thread in threads:
                thread.join()
            raise
        finally:
            server.server_close()


def _token(job: ServeJob) -> str | None:
    token = os.environ.get(TOKEN)
    if token is not None and len(token) < _LEAST_TOKEN:
        raise ConfigError(f"{TOKEN} has {len(token)} characters; a token has at least {_LEAST_TOKEN}.")
    if token is None and not job.is_local:
        raise ConfigError(
            f"host={job.host}: whoever reaches this address could ask; set {TOKEN} in the environment, or leave host "
            "out, which listens to this machine alone."
        )
    return token


def serve(job: ServeJob) -> None:
    """Answer until the process is ended."""
    with serving(job) as server:
        log.info("serving     %s", server.uri)
        threading.Event().wait()
