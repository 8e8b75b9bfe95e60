"""What is shown holds no secret, whichever way one came in, and is otherwise as it was."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.secrets import holds_secret, redact

SECRET = "Zq7/secret+of=ours"
VARIABLES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "FSSPEC_S3_KEY",
    "FSSPEC_S3_SECRET",
    "FSSPEC_ABFS_ACCOUNT_KEY",
    "GITHUB_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MYSQL_PWD",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
    "WANDB_API_KEY",
    "some_service_password",
    "DATABASE_URL",
    "PIP_INDEX_URL",
    "SLACK_WEBHOOK_URL",
    "SLACK_WEBHOOK",
    "GITHUB_PAT",
    "DB_PASS",
    "SENTRY_DSN",
]
PUBLIC = ["AWS_ENDPOINT_URL", "AWS_REGION", "HOME", "PATH", "PWD", "OLDPWD", "RAY_AUTH_MODE", "TOKENIZERS_PARALLELISM"]
PUBLIC += ["GOOGLE_APPLICATION_CREDENTIALS", "RAY_AUTH_TOKEN_PATH", "SSH_AUTH_SOCK", "AWS_SHARED_CREDENTIALS_FILE"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing secret but what a test sets."""
    for name in list(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_secret_of_the_environment_is_blotted_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    quoted, percent = json.dumps(SECRET), "Zq7%2Fsecret%2Bof%3Dours"
    assert redact(f"key {SECRET}, {quoted}, {percent}!") == 'key ***, "***", ***!'


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "a/public/value")
    assert redact("at a/public/value") == "at a/public/value"


def test_fsspecs_settings_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"key": "AKIAEXAMPLE", "client_kwargs": {"aws_session_token": SECRET, "region_name": "eu-somewhere"}}
    monkeypatch.setenv("FSSPEC_S3", json.dumps(given))
    assert redact(f"AKIAEXAMPLE {SECRET} eu-somewhere") == "*** *** eu-somewhere"
    monkeypatch.setenv("FSSPEC_S3", "{broken")
    assert redact("broken") == "broken"


def test_a_short_value_would_blot_out_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    assert redact("a test") == "a test"


ADDRESSES = {
    "s3://key:S@bucket/x": "s3://***@bucket/x",
    "s3://key:a/S@bucket/x": "s3://***@bucket/x",
    "redis://:S@host/0": "redis://***@host/0",
    "https://S@host/x": "https://***@host/x",
    "git+https://S@host/x": "git+https://***@host/x",
    "https://host/x?token=S&y=1": "https://host/x?token=***&y=1",
    "https://host/x?y=1&access_token=S": "https://host/x?y=1&access_token=***",
    "https://host/x?api-key=S": "https://host/x?api-key=***",
    "https://host/x?X-Amz-Credential=S&X-Amz-Signature=S": "https://host/x?X-Amz-Credential=***&X-Amz-Signature=***",
    "https://host/x?X-Goog-Signature=S": "https://host/x?X-Goog-Signature=***",
    "https://a.blob.core.windows.net/c/x?sv=2024&sig=S": "https://a.blob.core.windows.net/c/x?sv=2024&sig=***",
    "https://www.dropbox.com/s/x?rlkey=S&dl=1": "https://www.dropbox.com/s/x?rlkey=***&dl=1",
    "https://host/x?authkey=S": "https://host/x?authkey=***",
    "https://host/x?resourcekey=S": "https://host/x?resourcekey=***",
    "https://host/x?ticket=S": "https://host/x?ticket=***",
    "https://host/x?session=S": "https://host/x?session=***",
    "https://host/x?pass=S": "https://host/x?pass=***",
    "https://host/x#access_token=S": "https://host/x#access_token=***",
    "AccountName=a;AccountKey=S;EndpointSuffix=b": "AccountName=a;AccountKey=***;EndpointSuffix=b",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_secret_is_known_and_shown_without(address: str) -> None:
    with_secret = address.replace("S@", "hush@").replace("=S", "=hush")
    assert holds_secret(with_secret)
    assert redact(f"reading {with_secret} failed") == f"reading {ADDRESSES[address]} failed"
    assert not holds_secret(redact("no secret here"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("hf://hf_abcdefghijklmnop@datasets/x", "hf://***@datasets/x"),
        ("s3://AKIAIOSFODNN7EXAMPLE@bucket/x", "s3://***@bucket/x"),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/services/***"),
        ("https://discord.com/api/webhooks/1/abc", "https://discord.com/api/webhooks/***"),
    ],
)
def test_a_key_in_the_place_of_a_name_or_of_a_path_is_known_by_its_looks(address: str, shown: str) -> None:
    assert holds_secret(address)
    assert redact(f"to {address} now") == f"to {shown} now"


def test_a_header_that_a_library_repeats_is_blotted_out() -> None:
    assert redact("{'Authorization': 'Bearer hush.hush-hush', 'Accept': '*/*'}") == (
        "{'Authorization': 'Bearer ***', 'Accept': '*/*'}"
    )
    assert redact("authorization: hush") == "authorization: ***"


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9000/a@b harmless s3://bucket/a:b@c signature",
        "abfss://container@account.dfs.core.windows.net/x",
        "hf://datasets/org/name@main/x.parquet",
        "sftp://user@host/x",
        "corpus.jsonl, document 'd1': token id 97 is outside; scan.rank=auto; next token=7, key=value",
        "https://host/x?version=3&page=2#token",
        "s3://bucket/part-*.jsonl?",
    ],
)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_secret(text)


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "FSSPEC_S3_SECRET"]),
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0*"), min_size=6, max_size=20),
)
def test_no_text_shows_a_secret_of_the_environment(around: str, name: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        assert secret not in redact(f"{around}{secret}{around}")


@given(st.text(alphabet="abc:/@?&=;tokensig.*- ", max_size=60))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)
