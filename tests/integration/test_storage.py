"""The door to the store, on real servers: what is written, what is refused, and what the refusals say."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import object_store
from tasks.errors import NEVER_RETRY, DataError, RetryableError, SettingsError
from tasks.storage import (
    ConflictError,
    MissingObjectError,
    Store,
    StoreRefusedError,
    StoreUnreachableError,
    in_parallel,
    split_uri,
    to_json,
)

WRITERS = 20
CLOSED = "http://127.0.0.1:9"  # nobody listens there


def test_what_is_written_is_read_back(store: Store) -> None:
    store.put("a/one.json", b"1")
    assert store.get("a/one.json") == b"1"
    store.put_json("a/two.json", {"ñ": [1, None, "¿"]})
    assert store.get_json("a/two.json") == {"ñ": [1, None, "¿"]}
    assert store.exists("a/one.json")
    assert not store.exists("a/one")


def test_a_listing_has_every_key_in_order(store: Store) -> None:
    for number in (2, 10, 1):
        store.put(f"history/{number:08}.json", b"x" * number)
    store.put("historical", b"")
    assert [(entry.key, entry.size) for entry in store.list("history/")] == [
        (f"history/{number:08}.json", number) for number in (1, 2, 10)
    ]
    assert list(store.list("nothing/")) == []


def test_a_listing_longer_than_a_page_is_whole(store: Store) -> None:
    keys = [f"many/{number:04}" for number in range(1005)]  # a page has at most a thousand
    in_parallel(lambda key: store.put(key, b""), keys)
    assert [entry.key for entry in store.list("many/")] == keys


def test_a_key_may_have_any_character_that_is_no_control(store: Store) -> None:
    keys = sorted(f"odd/{name}" for name in ("a b", "a+b", "a%20b", "a?b=c", "a#b", "a&b", "ñ¿中", "a=b", "~'()*!"))
    for key in keys:
        place, name = split_uri(f"s3://{store.bucket}/{key}")
        assert (place.bucket, name) == (store.bucket, key)
        place.put(name, key.encode())
    assert [entry.key for entry in store.list("odd/")] == keys
    assert [store.get(key).decode() for key in keys] == keys


def test_large_files_and_folders_arrive_whole(store: Store, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(range(256)) * 90_000)  # 23 MB: moved in several parts
    (tmp_path / "empty").write_bytes(b"")
    files = {"f/large": tmp_path / "large", "f/empty": tmp_path / "empty"}
    store.upload_all(files)
    copies = {key: tmp_path / "copies" / path.name for key, path in files.items()}
    store.download_all(copies)
    assert all(copies[key].read_bytes() == path.read_bytes() for key, path in files.items())


def test_a_missing_object_is_named(store: Store, tmp_path: Path) -> None:
    for read in (store.get, store.get_json, lambda key: store.download(key, tmp_path / "x")):
        with pytest.raises(MissingObjectError, match=rf"^s3://{store.bucket}/no/such does not exist$"):
            read("no/such")
    assert not (tmp_path / "x").exists()


def test_what_is_not_json_is_named(store: Store) -> None:
    for content in (b"", b"{'a': 1}", b'{"a": ', b"\xff"):
        store.put("damaged.json", content)
        with pytest.raises(DataError, match=rf"^s3://{store.bucket}/damaged.json is damaged: it is not JSON"):
            store.get_json("damaged.json")


def test_a_write_with_a_condition_changes_nothing_when_it_loses(store: Store) -> None:
    first = store.put("pointer", b"1", if_absent=True)
    with pytest.raises(ConflictError):
        store.put("pointer", b"other", if_absent=True)
    store.put("pointer", b"2", if_match=first)
    with pytest.raises(ConflictError):
        store.put("pointer", b"other", if_match=first)
    assert store.get("pointer") == b"2"


@pytest.mark.parametrize("existing", [False, True])
def test_of_many_writers_with_a_condition_exactly_one_wins(existing: bool, store: Store) -> None:
    condition: dict[str, Any] = {"if_match": store.put("pointer", b"before")} if existing else {"if_absent": True}

    def write(content: str) -> str | None:
        try:
            store.put("pointer", content.encode(), **condition)
        except ConflictError:
            return None
        return content

    for attempt in range(5):
        with ThreadPoolExecutor(WRITERS) as pool:  # each content is new: equal contents would have equal ETags
            won = list(filter(None, pool.map(write, [f"{attempt}, {writer}" for writer in range(WRITERS)])))
        assert won == [store.get("pointer").decode()]
        condition = {"if_match": store.get_tagged("pointer")[1]}


def test_a_bucket_can_be_made_twice(store: Store) -> None:
    store.put("kept", b"1")
    store.create_bucket()
    assert store.get("kept") == b"1"


ACTIONS: list[Callable[[Store], Any]] = [
    lambda store: store.get("k"),
    lambda store: store.put("k", b""),
    lambda store: store.exists("k"),
    lambda store: list(store.list("k")),
    lambda store: store.upload(Path(__file__), "k"),
]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_bucket_that_does_not_exist_is_not_tried_again(action: Callable[[Store], Any], store: Store) -> None:
    if action is ACTIONS[2]:
        assert not Store("no-such-bucket").exists("k")  # HEAD has no body that could tell a bucket from an object
        return
    with pytest.raises(StoreRefusedError, match=r"there is no bucket 'no-such-bucket' at http.*: create it, or set"):
        action(Store("no-such-bucket"))


@pytest.mark.parametrize("action", ACTIONS)
def test_wrong_credentials_are_refused_and_not_shown(
    action: Callable[[Store], Any], minio: object_store.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on MiniStack, which accepts any secret for its root key."""
    wrong = {**minio.client_environment, "AWS_SECRET_ACCESS_KEY": "not-the-password"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreRefusedError, match="check the AWS credentials") as caught:
        action(Store("retrain"))
    assert "not-the-password" not in str(caught.value)
    assert minio.credentials.secret_key not in str(caught.value)
    assert caught.value.exit_code in NEVER_RETRY


def test_a_large_upload_that_is_refused_is_not_tried_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(9_000_000))  # in parts, which is another way into the store
    with pytest.raises(StoreRefusedError, match="there is no bucket 'no-such-bucket'"):
        Store("no-such-bucket").upload(tmp_path / "large", "k")


def test_no_credentials_at_all_say_which_to_set(
    ministack: object_store.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", ministack.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else a cloud's own service is asked, and waited for
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StoreRefusedError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store("retrain").get("k")


def test_a_profile_gives_key_and_region(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The usual chain, for one of its other ends."""
    store.put("k", b"1")
    key, secret = (os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    (tmp_path / "credentials").write_text(f"[team]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    (tmp_path / "config").write_text("[profile team]\nregion = eu-west-3\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    by_profile = Store(store.bucket)
    assert by_profile.get("k") == b"1"
    assert by_profile._client.meta.region_name == "eu-west-3"


@pytest.mark.parametrize("action", ACTIONS)
def test_a_store_that_does_not_answer_is_worth_another_try(
    action: Callable[[Store], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "S3_ENDPOINT_URL": CLOSED,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnreachableError, match=r"127\.0\.0\.1:9") as caught:
        action(Store("retrain"))
    assert isinstance(caught.value, RetryableError)
    assert "a-secret" not in str(caught.value)


def test_a_store_that_is_away_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    for name, value in {"S3_ENDPOINT_URL": CLOSED, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(StoreUnreachableError):
        Store("retrain").upload_all({f"k{number}": Path(__file__) for number in range(100)})
    assert time.monotonic() - started < 15  # three attempts of the first files, and none of the others


@contextmanager
def answering(headers: dict[str, str], body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A bucket of something that answers every request in this way, and then hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        yield Store("retrain")
        server.shutdown()


def test_a_connection_that_is_cut_in_the_middle_is_worth_another_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with answering({"Content-Length": "1000", "ETag": '"e"'}, b"half", monkeypatch) as store:
        for read in (store.get, lambda key: store.download(key, tmp_path / "k")):
            with pytest.raises(StoreUnreachableError, match="could not read s3://retrain/k"):
                read("k")
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_no_stores_is_an_error_and_no_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        answering({"Content-Type": "text/html"}, b"<html>Welcome<br></html>", monkeypatch) as store,
        pytest.raises(StoreUnreachableError, match="the object store failed to list s3://retrain/k"),
    ):
        list(store.list("k"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("localhost:9000", "'localhost:9000'"),
        ("http://", "'http://'"),
        ("ftp://host", "'ftp://host'"),
        ("http://user:pass-word@host:9000", "'http://***@host:9000'"),
        ("user:pass-word@host:9000", "'***@host:9000'"),
        ("http://user:pass-w@rd@host", "'http://***@host'"),
    ],
)
def test_an_address_that_is_none_is_refused_and_no_password_shown(
    address: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", address)
    with pytest.raises(SettingsError) as caught:
        Store("retrain")
    assert f"S3_ENDPOINT_URL is {shown}: expected http://HOST:PORT" in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://host", "https://host:9000/", "http://[::1]:9000", "https://host/storage/s3"]
)
def test_an_address_of_a_store_is_taken_as_it_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", address)
    assert Store("retrain").endpoint == address


@pytest.mark.parametrize(
    ("bucket", "profile", "message"),
    [("no bucket!", None, "Invalid bucket name"), ("retrain", "nobody", r"profile \(nobody\) could not be found")],
)
def test_a_setting_that_boto3_refuses_is_not_tried_again(
    bucket: str, profile: str | None, message: str, ministack: object_store.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ministack.client_environment, **({"AWS_PROFILE": profile} if profile else {})}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreRefusedError, match=message):
        Store(bucket).get("k")


@pytest.mark.parametrize(
    "uri",
    ["", "s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3://[/key", "s3://u@b/k", "http://b/key", "/b/key"],
)
def test_what_is_no_place_in_a_store_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError, match="expected s3://BUCKET/KEY"):
        split_uri(uri)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": number})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_json_says_the_same_when_it_is_read_again(value: Any) -> None:
    assert json.loads(to_json(value)) == value
