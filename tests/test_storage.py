"""Laws of storage, the same over a local disk, one process's memory and a real S3 server."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.errors import StorageError
from infscan.storage import Entry, MissingError, Store, expand, is_uri, localise, open_input
from infscan.storage import local as local_module
from infscan.storage import remote as remote_module
from infscan.storage import retry as retry_module
from tests.chaos.proxy import Proxy, always, first
from tests.conftest import Bucket

PREFIX = "a run #1 (100 %)"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path)) / PREFIX
    root = f"memory://{tmp_path.name}" if request.param == "memory" else request.getfixturevalue("s3").uri()
    return Store(root) / PREFIX


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "5")


def names(store: Store, *arguments: str) -> list[str]:
    return [entry.name for entry in store.list(*arguments)]


class TestLawsOfEveryStore:
    def test_what_is_written_is_read_back(self, store: Store) -> None:
        store.write("a/b c.bin", b"\0\1")
        store.write("a/b c.bin", b"second")
        store.write("empty", b"")
        assert store.read("a/b c.bin") == b"second"
        assert store.read("empty") == b""
        assert (store / "a").read("b c.bin") == b"second"

    def test_json_keeps_values_and_order(self, store: Store) -> None:
        value = {"z": [1, 2.5, None], "a": "é"}
        store.write_json("x.json", value)
        assert store.read_json("x.json") == value
        text = store.read("x.json").decode()
        assert text.endswith("}\n")
        assert text.index('"z"') < text.index('"a"')
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.write_json("y.json", float("nan"))
        store.write("x.json", b"{")
        with pytest.raises(StorageError, match=r"x\.json is not valid JSON"):
            store.read_json("x.json")

    def test_create_happens_once_of_eight_at_once(self, store: Store) -> None:
        start = threading.Barrier(8)

        def create(number: int) -> bool:
            start.wait()
            return store.create("plan.json", f"plan {number}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.read("plan.json") == f"plan {won.index(True)}".encode()
        assert store.create("plan.json", b"late") is False
        assert names(store) == ["plan.json"]

    def test_list_is_sorted_complete_and_below_its_prefix(self, store: Store) -> None:
        for name in ["shards/b.parquet", "shards/a.parquet", "shards/deep/c.json", "shards-old/d.parquet", "top.json"]:
            store.write(name, name.encode())
        assert names(store, "shards") == ["shards/a.parquet", "shards/b.parquet", "shards/deep/c.json"]
        assert names(store, "shards/", ".parquet") == ["shards/a.parquet", "shards/b.parquet"]
        assert len(store.list()) == 5
        assert store.list() == sorted(store.list(), key=lambda entry: entry.name)
        assert names(store / "shards") == ["a.parquet", "b.parquet", "deep/c.json"]
        assert store.list("nothing") == []
        assert (store / "nothing").list() == []
        assert [entry.size for entry in store.list("top.json")] == []
        assert {entry.name: entry.size for entry in store.list()}["top.json"] == len("top.json")

    def test_an_etag_changes_with_the_content(self, store: Store) -> None:
        store.write("x", b"one")
        (first,) = store.list()
        assert store.list() == [first]
        store.write("x", b"other")
        (second,) = store.list()
        assert isinstance(second, Entry)
        assert first.etag != second.etag

    def test_presence_and_removal(self, store: Store) -> None:
        assert not store.exists("a/x")
        store.remove("a/x")
        store.write("a/x", b"1")
        assert store.exists("a/x")
        assert not store.exists("a")
        store.remove("a/x")
        assert not store.exists("a/x")
        assert store.list() == []

    def test_a_missing_file_is_an_error_that_names_it(self, store: Store) -> None:
        for access in (store.read, store.open):
            with pytest.raises(MissingError) as caught:
                access("no/such")
            assert f"{store.uri}/no/such" in str(caught.value)

    @pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", ".", "", "a/", "a\0b"])
    def test_names_stay_below_the_store(self, store: Store, name: str) -> None:
        for access in (store.read, store.exists, store.remove, store.open, store.__truediv__):
            with pytest.raises(StorageError):
                access(name)
        with pytest.raises(StorageError):
            store.write(name, b"x")
        with pytest.raises(StorageError):
            store.create(name, b"x")

    def test_a_store_travels_by_pickle(self, store: Store) -> None:
        store.write("x", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert copy == store
        assert copy.read("x") == b"1"

    def test_open_seeks_and_reads_like_a_file(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_module, "BUFFER_BYTES", 16)
        data = bytes(range(256)) * 4
        store.write("x", data)
        with store.open("x") as file:
            assert file.seekable()
            assert file.read(3) == data[:3]
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:]
            assert file.read(1) == b""
            file.seek(100)
            assert file.read(500) == data[100:600]
        with store.open("x") as one, store.open("x") as two:
            one.seek(7)
            assert two.read(1) == data[:1]

    def test_open_serves_parquet_readers(self, store: Store) -> None:
        table = pa.table({"n": list(range(1000)), "s": [str(n) for n in range(1000)]})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=100)
        store.write("t.parquet", sink.getvalue())
        with store.open("t.parquet") as file:
            reader = pq.ParquetFile(file)
            assert reader.read_row_group(7, ["n"])["n"].to_pylist() == list(range(700, 800))
            assert reader.read().equals(table)

    def test_the_preflight_leaves_nothing_behind(self, store: Store) -> None:
        store.check_writable()
        assert store.list() == []

    def test_inputs_are_found_by_name_folder_and_glob(self, store: Store) -> None:
        wanted = ["b.jsonl", "deep/c.jsonl", "a.txt", "[odd].jsonl"]
        for name in [*wanted, "_SUCCESS", ".hidden", "_temporary/0/part.jsonl", "deep/.x.jsonl"]:
            store.write(name, name.encode())

        def found(pattern: str) -> list[str]:
            files = expand(f"{store.uri}{pattern}")
            assert all(open_input(file.uri).read().decode() == file.uri[len(store.uri) + 1 :] for file in files)
            return [file.uri[len(store.uri) + 1 :] for file in files]

        assert found("") == found("/") == sorted(wanted)
        assert found("/b.jsonl") == ["b.jsonl"]
        assert found("/[odd].jsonl") == ["[odd].jsonl"]
        assert found("/_SUCCESS") == ["_SUCCESS"]
        assert found("/*.jsonl") == ["[odd].jsonl", "b.jsonl"]
        assert found("/**/*.jsonl") == ["[odd].jsonl", "b.jsonl", "deep/c.jsonl"]
        assert found("/d*") == ["deep/c.jsonl"]
        assert found("/?.[jt]*") == ["a.txt", "b.jsonl"]
        assert found("/_temp*") == ["_temporary/0/part.jsonl"]
        assert expand(f"{store.uri}/b.jsonl")[0].size == len("b.jsonl")
        for pattern in ("/nothing", "/*.parquet", "/b.jsonl/x"):
            with pytest.raises(StorageError, match=r"no such file or folder|no file matches") as caught:
                expand(f"{store.uri}{pattern}")
            assert f"{store.uri}{pattern}" in str(caught.value)
        with pytest.raises(MissingError, match="nothing"):
            open_input(f"{store.uri}/nothing")


class TestLocalDisk:
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_failed_write_leaves_the_old_content_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        store = Store(str(tmp_path))
        store.write("x", b"old")

        def fail(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(local_module.os, step, fail)
        with pytest.raises(StorageError, match="disk is full") as caught:
            store.write("x", b"new")
        assert str(tmp_path / "x") in str(caught.value)
        with pytest.raises(StorageError, match="disk is full"):
            store.write("y", b"new")
        monkeypatch.undo()
        assert store.read("x") == b"old"
        assert os.listdir(tmp_path) == ["x"]

    def test_a_killed_writer_leaves_whole_files_only(self, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom infscan.storage import Store\nstore = Store(sys.argv[1])\nnumber = 0\n"
            "while True:\n number = (number + 1) % 250\n store.write('x', bytes([number]) * 3_000_000)\n"
            " print(number, flush=True)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.kill()
        process.communicate()
        data = Store(str(tmp_path)).read("x")
        assert len(data) == 3_000_000
        assert len(set(data)) == 1
        assert names(Store(str(tmp_path))) == ["x"]

    def test_no_listing_shows_a_file_that_is_being_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = Store(str(tmp_path))
        replace, seen = os.replace, []

        def look(source: str, target: str) -> None:
            seen.append((len(os.listdir(tmp_path)), store.list(), os.path.dirname(source) == os.path.dirname(target)))
            replace(source, target)

        monkeypatch.setattr(local_module.os, "replace", look)
        store.write("x", b"1")
        assert seen == [(1, [], True)]

    def test_a_disk_without_hard_links_creates_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(local_module.os, "link", refuse)
        store = Store(str(tmp_path))
        assert store.create("x", b"1") is True
        assert store.create("x", b"2") is False
        assert store.read("x") == b"1"
        assert os.listdir(tmp_path) == ["x"]

    @pytest.mark.parametrize(
        ("number", "fix"),
        [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")],
    )
    def test_the_preflight_says_what_is_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
    ) -> None:
        def fail(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(local_module.os, "fsync", fail)
        with pytest.raises(StorageError, match=fix) as caught:
            Store(str(tmp_path)).check_writable()
        assert str(caught.value).startswith(f"{tmp_path}: ")

    def test_the_preflight_refuses_a_full_disk_and_a_file_in_the_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        for place in ("file", "file/below"):
            with pytest.raises(StorageError, match="choose another path"):
                Store(str(tmp_path / place)).check_writable()
        full = type("usage", (), {"free": 0})()
        monkeypatch.setattr(local_module.shutil, "disk_usage", lambda folder: full)
        with pytest.raises(StorageError, match="disk is full"):
            Store(str(tmp_path)).check_writable()

    def test_links_are_followed_once_and_broken_ones_named(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "x").write_bytes(b"1")
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "loop").symlink_to(tmp_path / "corpus")
        assert [file.uri for file in expand(str(tmp_path / "corpus"))] == [str(tmp_path / "corpus" / "linked" / "x")]
        (tmp_path / "corpus" / "gone").symlink_to(tmp_path / "nowhere")
        with pytest.raises(StorageError, match="gone: this link leads nowhere"):
            expand(str(tmp_path / "corpus"))

    def test_addresses_become_absolute_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert Store("run/../out").uri == Store(f"file://{tmp_path}/out").uri == str(tmp_path / "out")
        assert Store("~/x").uri == str(tmp_path / "home" / "x")
        assert Store("out").local_path("a/b") == tmp_path / "out" / "a" / "b"
        assert Store("out").local_path() == tmp_path / "out"
        assert Store("memory://x").local_path() is None


class TestObjectStores:
    def test_a_listing_sees_what_another_client_just_did(self, s3: Bucket) -> None:
        store, other, prefix = Store(s3.uri()), s3.server.client(), ""
        prefix = store.uri.split("/", 3)[3]
        assert store.list() == []
        assert not store.exists("x")
        other.put_object(Bucket=s3.name, Key=f"{prefix}/x", Body=b"1")
        assert names(store) == ["x"]
        assert store.exists("x")
        other.put_object(Bucket=s3.name, Key=f"{prefix}/x", Body=b"longer")
        assert [entry.size for entry in store.list()] == [6]
        assert store.read("x") == b"longer"
        other.delete_object(Bucket=s3.name, Key=f"{prefix}/x")
        assert store.list() == []
        assert not store.exists("x")

    def test_another_process_with_the_given_environment_sees_the_same(self, s3: Bucket) -> None:
        store = Store(s3.uri())
        store.write("x", b"1")
        code = "import sys\nfrom infscan.storage import Store\nprint(Store(sys.argv[1]).create('x', b'2'))"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | s3.env
        run = subprocess.run([sys.executable, "-c", code, store.uri], env=environment, capture_output=True, check=True)
        assert run.stdout == b"False\n"

    def test_large_objects_go_up_in_parts_and_come_back(self, s3: Bucket) -> None:
        data = os.urandom(1 << 20) * 101  # s3fs uploads in parts from 100 MiB
        store = Store(s3.uri())
        store.write("large", data)
        assert store.read("large") == data
        assert store.create("large", b"x") is False

    def test_listings_go_past_a_page(self, moto_s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # a thousand on a real server
        store = Store(moto_s3.uri())
        wanted = [f"shard-{number:06d}" for number in range(25)]
        for name in wanted:
            store.write(name, b"")
        assert names(store) == wanted
        assert len(expand(store.uri)) == 25

    def test_inputs_may_come_by_http(self, moto_s3: Bucket) -> None:
        moto_s3.server.client().put_object(
            Bucket=moto_s3.name, Key="public/a.jsonl", Body=b"some bytes", ACL="public-read"
        )
        uri = f"{moto_s3.server.endpoint}/{moto_s3.name}/public/a.jsonl"
        assert [(file.uri, file.size) for file in expand(uri)] == [(uri, 10)]
        with open_input(uri) as file:
            assert file.read() == b"some bytes"

    @pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
    def test_wrong_credentials_are_refused_without_being_shown(
        self, s3: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        store = Store(s3.uri())
        monkeypatch.setenv(variable, "NotTheRightOne")
        accesses: list[Callable[[], object]] = [
            store.check_writable,
            store.list,
            lambda: store.read("x"),
            lambda: store.open("x"),
            lambda: store.exists("x"),
            lambda: store.create("x", b""),
            lambda: expand(store.uri),
            lambda: localise(store.uri, (".json",)),
        ]
        for access in accesses:
            with pytest.raises(StorageError, match="refused access") as caught:
                access()
            assert not isinstance(caught.value, MissingError)
            assert store.uri in str(caught.value)
            assert "NotTheRightOne" not in str(caught.value)
            assert s3.server.secret not in str(caught.value)

    def test_missing_credentials_say_which_to_set(self, s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, os.devnull)
        with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            Store(s3.uri()).check_writable()

    def test_a_missing_bucket_is_an_error_and_no_empty_folder(self, s3: Bucket) -> None:
        store = Store("s3://infscan-no-such-bucket/run")
        accesses: list[Callable[[], object]] = [
            store.check_writable,
            store.list,
            lambda: store.exists("x"),
            lambda: store.create("x", b""),
            lambda: expand(store.uri),
        ]
        for access in accesses:
            with pytest.raises(StorageError, match="bucket does not exist; create it") as caught:
                access()
            assert store.uri in str(caught.value)

    @pytest.mark.usefixtures("no_pauses")
    def test_an_unreachable_store_is_named(self, s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
            Store(s3.uri()).check_writable()

    def test_an_unknown_scheme_is_refused(self) -> None:
        with pytest.raises(StorageError, match="nosuch:// cannot be opened"):
            Store("nosuch://x/y").list()

    def test_model_folders_are_downloaded_once_and_again_when_they_change(
        self, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote_module, "BUFFER_BYTES", 1 << 10)
        store = Store(s3.uri("a model #2"))
        weights = os.urandom(10_000)
        store.write("model.safetensors", weights)
        store.write("sub/config.json", b"{}")
        store.write("pytorch_model.bin", b"never")
        with ThreadPoolExecutor(4) as pool:
            (folder,) = set(pool.map(lambda _: localise(store.uri, (".safetensors", ".json")), range(4)))
        found = {entry.name: (folder / entry.name).read_bytes() for entry in Store(str(folder)).list()}
        assert found == {"model.safetensors": weights, "sub/config.json": b"{}"}
        assert localise(str(folder), (".json",)) == folder
        assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder.name]

        opened: list[str] = []
        monkeypatch.setattr(remote_module.ObjectStore, "open", lambda self, uri: opened.append(uri))
        assert localise(store.uri, (".safetensors", ".json")) == folder
        assert opened == []
        monkeypatch.undo()

        monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))
        store.write("sub/config.json", b'{"a": 1}')
        changed = localise(store.uri, (".safetensors", ".json"))
        assert changed != folder
        assert json.loads((changed / "sub" / "config.json").read_text()) == {"a": 1}
        with pytest.raises(StorageError, match=r"no \.gguf file"):
            localise(store.uri, (".gguf",))
        with pytest.raises(StorageError, match="is no folder"):
            localise(str(tmp_path / "nothing"), (".json",))

    def test_a_failed_download_leaves_nothing_that_looks_complete(
        self, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path))
        store = Store(s3.uri())
        store.write("a.json", b"{}")
        store.write("b.json", b"{}")
        genuine = remote_module.ObjectStore.open

        def fail_late(self: remote_module.ObjectStore, uri: str) -> object:
            if uri.endswith("b.json"):
                raise StorageError("gone")
            return genuine(self, uri)

        monkeypatch.setattr(remote_module.ObjectStore, "open", fail_late)
        with pytest.raises(StorageError, match="gone"):
            localise(store.uri, (".json",))
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("no_pauses")
class TestFaultyStores:
    @pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
    def test_a_passing_fault_is_outlived(self, faulty_s3: tuple[Bucket, Proxy], fault: str) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        proxy.plan = first(2, fault if fault != "cut" else "503", "PUT")
        store.write("x", b"some bytes")
        proxy.plan = first(2, fault, "GET")
        assert store.read("x") == b"some bytes"
        proxy.plan = first(2, fault, "GET")
        with store.open("x") as file:
            assert file.read() == b"some bytes"
        proxy.plan = first(2, fault, "GET")
        assert names(store) == ["x"]
        proxy.plan = first(2, "503")
        assert store.exists("x")

    def test_a_lasting_fault_ends_in_an_error_and_shows_no_half(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket, proxy = faulty_s3
        monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "0.5")
        store = Store(bucket.uri())
        store.write("x", b"old")
        proxy.plan = always("503", "PUT")
        before = len(proxy.requests)
        for write in (store.write, store.create):
            with pytest.raises(StorageError, match=r"answered SlowDown, \d+ times") as caught:
                write("y", b"new")
            assert f"{store.uri}/y" in str(caught.value)
            attempts = sum(method == "PUT" for method, _ in proxy.requests[before:])
            assert attempts > 1
            assert f"SlowDown, {attempts} times" in str(caught.value)
            before = len(proxy.requests)
        with pytest.raises(StorageError):
            store.write("x", b"new")
        assert store.read("x") == b"old"
        assert names(store) == ["x"]

    def test_a_multipart_upload_that_fails_is_aborted(self, faulty_s3: tuple[Bucket, Proxy]) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        proxy.plan = always("403", within="partNumber=2")
        with pytest.raises(StorageError):
            store.write("large", bytes(101 << 20))
        assert store.list() == []
        assert "Uploads" not in bucket.server.client().list_multipart_uploads(Bucket=bucket.name)

    def test_a_store_that_never_answers_is_given_up(
        self, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket, proxy = faulty_s3
        monkeypatch.setenv("INFSCAN_STORAGE_TIMEOUT_S", "0.2")
        monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "0.5")
        proxy.plan = always("hang")
        with pytest.raises(StorageError, match="does not answer"):
            Store(bucket.uri()).read("x")

    def test_a_store_without_conditional_puts_still_creates(self, faulty_s3: tuple[Bucket, Proxy]) -> None:
        bucket, proxy = faulty_s3
        store = Store(bucket.uri())
        proxy.plan = first(1, "501", "PUT")
        assert store.create("x", b"1") is True
        assert store.create("x", b"2") is False
        assert store.read("x") == b"1"

    def test_a_race_lost_on_the_server_is_no_error(
        self, moto_s3: Bucket, s3: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The check before the put is blinded, so that the put itself loses.
        monkeypatch.setattr(remote_module.ObjectStore, "stat", lambda self, uri: None)
        for bucket in (moto_s3, s3):
            for name, value in bucket.env.items():
                monkeypatch.setenv(name, value)
            store = Store(bucket.uri())
            store.write("x", b"1")
            assert store.create("x", b"2") is False
            assert store.read("x") == b"1"

    def test_an_object_that_shrinks_while_it_is_read_is_noticed(
        self, moto_s3: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote_module, "BUFFER_BYTES", 16)
        store = Store(moto_s3.uri())
        store.write("x", bytes(100))
        with store.open("x") as file:
            file.read(10)
            store.write("x", bytes(50))
            file.seek(40)
            with pytest.raises(StorageError, match="changed while it was read"):
                file.read(20)


class TestAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "s3://AKIAX:sec/ret@bucket/x",
            "https://u:p@host/x",
            "https://sec@host/x",
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=secretive",
            "https://host/x?token=secretive",
        ],
    )
    def test_credentials_in_an_address_are_refused_and_not_repeated(self, address: str) -> None:
        for use in (Store, expand, open_input, lambda uri: localise(uri, (".json",))):
            with pytest.raises(StorageError, match="carries credentials") as caught:
                use(address)
            assert "sec" not in str(caught.value)
            assert ":p@" not in str(caught.value)

    @pytest.mark.parametrize("address", ["", "s3://", "s3:///", "s3://bucket/../x", "a\0b", "s3://buck*/x"])
    def test_addresses_of_nothing_are_refused(self, address: str) -> None:
        with pytest.raises(StorageError):
            expand(address)

    def test_one_place_has_one_spelling(self) -> None:
        assert Store("s3://bucket/a/") == Store("S3://bucket/a") == Store("s3://bucket") / "a"
        assert Store("memory:///a") == Store("memory://") / "a"
        assert str(Store("s3://bucket/a@b:c")) == "s3://bucket/a@b:c"

    def test_what_is_a_uri(self) -> None:
        assert is_uri("s3://b/x")
        assert is_uri("file:///x")
        assert not any(map(is_uri, ["/a/b", "a:b", "EleutherAI/pythia-70m", "./s3:/x", ""]))
