"""Stores: a folder by its URI and a real S3 server, held to the same contract; and what is no URI of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raytune_autotuner.report.store import PROBE, Store, place
from raytune_autotuner.study.errors import ConfigError

if TYPE_CHECKING:
    from tests.s3_server import S3Server


@pytest.fixture
def file_store(tmp_path: Path) -> Store:
    return opened((tmp_path / "shared").as_uri())


@pytest.fixture
def s3_store(s3: S3Server, request: pytest.FixtureRequest) -> Store:
    return opened(s3.at(request.node.name.partition("[")[0]))


@pytest.fixture(params=["file_store", "s3_store"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue(request.param)
    return found


def opened(uri: str) -> Store:
    found = place(uri)
    assert isinstance(found, Store)
    return found


def test_what_is_written_is_listed_by_its_name_and_read_back(store: Store) -> None:
    store.write("study.yaml", b"study: one\n")
    store.write("trials/0-a/engine.log.gz", b"not compressed\n")
    assert {name: entry.size for name, entry in store.files().items()} == {
        "study.yaml": 11,
        "trials/0-a/engine.log.gz": 15,
    }
    assert list(store.files(recursive=False)) == ["study.yaml"]
    assert store.folders("trials") == ["0-a"]
    assert store.read("trials/0-a/engine.log.gz", 4) == b"compressed\n"
    assert (store / "trials").read("0-a/engine.log.gz") == b"not compressed\n"


def test_an_object_takes_the_place_of_the_one_before(store: Store) -> None:
    for content in (b"long before", b"now"):
        store.write("status.json", content)
    assert store.read("status.json") == b"now"
    assert list(store.files()) == ["status.json"]


def test_a_folder_that_nobody_has_written_to_is_empty(store: Store) -> None:
    assert store.files("nothing") == {}
    assert store.folders() == []


def test_a_store_that_takes_a_write_is_a_good_one(store: Store) -> None:
    store.check_writable()
    store.check_writable()
    assert list(store.files()) == [PROBE]


def test_a_bucket_that_is_not_there_is_told_before_anything_starts(s3: S3Server) -> None:
    uri = s3.uri.replace(s3.bucket, "another-bucket")
    with pytest.raises(ConfigError, match=r"cannot be written: .*does not exist"):
        opened(uri).check_writable()


def test_a_folder_that_cannot_be_made_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot be written: .*file"):
        opened((tmp_path / "file" / "results").as_uri()).check_writable()


def test_names_that_climb_out_of_the_store_are_not_seen(s3: S3Server) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    for key in ("climbing/good", "climbing/../../evil"):
        client.put_object(Bucket=s3.bucket, Key=key, Body=b"content")
    client.close()
    assert list(opened(s3.at("climbing")).files()) == ["good"]


@pytest.mark.parametrize("text", ["results", "/abs/olute", "s3", "a:b/c"])
def test_what_is_no_uri_is_a_folder(text: str) -> None:
    assert place(text) == Path(text)


def test_a_folder_in_ones_home_may_be_written_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert place("~/runs", in_study=True) == Path("/home/someone/runs")
    with pytest.raises(ConfigError, match="no such home folder"):
        place("~no-such-user/runs")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA0123456789ABCDEF:wJalrXUtnFEMI@bucket/path",
        "s3://AKIA0123456789ABCDEF:wJal/rXUtnFEMI@bucket/path",
        "s3://wJalrXUtnFEMI@bucket/path",
        "s3://bucket/path?secret_key=wJalrXUtnFEMI",
        "s3://bucket/path?endpoint_override=user:wJalrXUtnFEMI@host",
        "ftp://user:wJalrXUtnFEMI@host/path",
    ],
)
def test_a_uri_with_credentials_in_it_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"results (s3|ftp)://") as error:
        place(uri)
    assert "wJal" not in str(error.value)
    assert "rXUtnFEMI" not in str(error.value)


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///path", "gs://", "file://host/path", "s3://bucket/../path", "s3:/bucket/path"]
)
def test_a_uri_without_a_bucket_or_with_a_host_is_told_how_to_be_written(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as (s3|gs|file)://"):
        place(uri)


def test_a_study_does_not_choose_where_credentials_go() -> None:
    assert place("s3://bucket/path?region=eu-west-1", in_study=True) == Store("s3://bucket/path?region=eu-west-1")
    with pytest.raises(ConfigError, match="a study may not name an endpoint"):
        place("s3://bucket/path?endpoint_override=evil.example&scheme=http", in_study=True)


def test_a_parameter_that_pyarrow_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bla"):
        opened("s3://bucket/path?bla=1").check_writable()


def test_copies_of_different_stores_lie_in_different_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    uris = ["s3://b/p", "gs://b/p", "file:///b/p", "s3://b/p?endpoint_override=localhost:9000", "s3://b/q"]
    assert len({opened(uri).local for uri in uris}) == len(uris)
    assert opened(uris[3]).local == Path("s3-localhost-9000/b/p")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert opened(uris[0]).local == Path("s3-http-localhost-9000/b/p")


def test_a_name_goes_into_a_uris_path_and_not_into_its_query() -> None:
    assert str(opened("s3://b/p?region=us-east-1") / "run") == "s3://b/p/run?region=us-east-1"
    assert str(opened("file:///p/") / "run") == "file:///p/run"
