"""The proxy plays what it is told, and nothing else: the faults of other tests are what they say."""

from __future__ import annotations

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.chaos.proxy import FAULTS, Plan, always, fault_proxy, first
from tests.conftest import Bucket


def key_of(uri: str) -> str:
    return uri.split("/", 3)[3]


def test_without_a_plan_everything_passes_at_a_server_that_checks_signatures(s3: Bucket) -> None:
    key = key_of(s3.uri())
    with fault_proxy(s3.server) as proxy:
        client = proxy.server.client()
        client.put_object(Bucket=s3.name, Key=key, Body=b"some bytes", IfNoneMatch="*")
        assert client.get_object(Bucket=s3.name, Key=key, Range="bytes=5-")["Body"].read() == b"bytes"
        assert client.head_object(Bucket=s3.name, Key=key)["ContentLength"] == 10
        client.delete_object(Bucket=s3.name, Key=key)
        assert proxy.played == 0
        assert proxy.counts["passed"] == 4
        assert [method for method, _ in proxy.requests] == ["PUT", "GET", "HEAD", "DELETE"]
    assert s3.server.client().list_objects_v2(Bucket=s3.name, Prefix=key)["KeyCount"] == 0


@pytest.mark.parametrize(
    ("fault", "reaches"),
    [("500", False), ("503", False), ("429", False), ("reset", False), ("lost", True), ("cut", True)],
)
def test_a_fault_shows_and_reaches_the_server_or_not(moto_s3: Bucket, fault: str, reaches: bool) -> None:
    key = key_of(moto_s3.uri())
    with fault_proxy(moto_s3.server, first(1, fault, "PUT")) as proxy:

        def put() -> None:
            proxy.server.client().put_object(Bucket=moto_s3.name, Key=key, Body=b"x")

        kind = ClientError if fault.isdigit() else BotoCoreError
        with pytest.raises(kind) as caught:
            put()
        if isinstance(caught.value, ClientError):
            assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == int(fault)
        there = moto_s3.server.client().list_objects_v2(Bucket=moto_s3.name, Prefix=key)["KeyCount"]
        assert there == int(reaches)
        put()
        assert proxy.counts == {fault: 1, "passed": 1}


def test_a_cut_body_is_half_of_what_was_promised(moto_s3: Bucket) -> None:
    key = key_of(moto_s3.uri())
    moto_s3.server.client().put_object(Bucket=moto_s3.name, Key=key, Body=bytes(1000))
    with fault_proxy(moto_s3.server, always("cut", "GET")) as proxy:
        body = proxy.server.client().get_object(Bucket=moto_s3.name, Key=key)
        assert body["ContentLength"] == 1000
        with pytest.raises(BotoCoreError):
            body["Body"].read()
        proxy.plan = always("slow", "GET")
        assert proxy.server.client().get_object(Bucket=moto_s3.name, Key=key)["Body"].read() == bytes(1000)


def test_a_plan_depends_on_its_seed_and_not_on_the_order_of_requests() -> None:
    asked = [("GET", f"/b/{n % 10}") for n in range(400)]
    one, two, other = (Plan(seed) for seed in (1, 1, 2))
    there = [one(*request) for request in asked]
    by_path = {path: [two("GET", path) for _ in range(40)] for _, path in asked[:10]}
    assert by_path == {path: [f for f, (_, p) in zip(there, asked, strict=True) if p == path] for path in by_path}
    assert [other(*request) for request in asked] != there
    assert set(there) == {None, *FAULTS}


def test_after_so_many_faults_in_a_row_a_request_passes() -> None:
    plan = Plan(seed=3, rate=1.0, in_a_row=2)
    assert [plan("GET", "/x") is None for _ in range(9)] == [False, False, True] * 3
