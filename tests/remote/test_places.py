"""How places are written, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.errors import ConfigError
from softcache.remote.folder import Folder
from softcache.remote.places import Place, is_place, parse_place

ID = "3f9a2b7c41d0e856" * 4


@pytest.mark.parametrize(
    ("text", "id", "wanted"),
    [
        ("https://host/a/b", None, Place("https://host/a/b", "https")),
        (f"https://host/a/b@{ID}", None, Place("https://host/a/b", "https", ID)),
        (f"https://host/a/b@{ID[:12]}", ID, Place("https://host/a/b", "https", ID)),
        ("http://host/a/", ID[:12], Place("http://host/a", "http", ID[:12])),
        ("file:/a/b", None, Place("file:/a/b", "file")),
        (f"file:a@b@{ID[:12]}", None, Place("file:a@b", "file", ID[:12])),
        ("file:a@team", None, Place("file:a@team", "file")),
        ("file:a@20261130", None, Place("file:a@20261130", "file")),
    ],
)
def test_a_place_is_read(text: str, id: str | None, wanted: Place) -> None:
    assert parse_place(text, id) == wanted
    assert is_place(text)


@pytest.mark.parametrize("text", ["caches/a", "/caches/a", "a@b", "C:\\caches", "hello:there"])
def test_a_folder_is_no_place(text: str) -> None:
    assert not is_place(text)


@pytest.mark.parametrize(
    ("text", "id", "message"),
    [
        ("caches/a", None, "is no URL"),
        ("ftp://host/a", None, "does not know ftp:"),
        ("https://name:secret@host/a", None, "stands in the URL"),
        ("https://host/a?token=b", None, "is no folder of a web server"),
        ("http://[::1/a", None, "is no URL"),
        ("http://h:abc/a", None, "is no URL"),
        ("http://h/ü", None, "is no URL"),
        ("http://h/a b", None, "has a blank"),
        ("https:///a", None, "is no folder of a web server"),
        (f"https://host/a@{ID}", "0" * 64, "another id"),
        ("https://host/a", "latest", "is no id"),
        ("hf:cache", None, "write hf:ORG/NAME"),
        ("hf://team/cache", None, "write hf:ORG/NAME"),
        ("hf:datasets/team/cache", None, "write hf:ORG/NAME"),
        ("hf:team/cache/../b", None, "write hf:ORG/NAME"),
        ("hf:team/cache@main", None, "write hf:ORG/NAME"),
        ("hf:team:secret@x/cache", None, "is no repository of data"),
        ("hg:team/cache", None, "did you mean"),
        ("s3:bucket/a", None, "write s3://BUCKET/PATH"),
        ("s3://key:secret@bucket/a", None, "AWS_ACCESS_KEY_ID"),
        ("az://c/a?sig=secret", None, "is no folder of a bucket"),
        ("s3a://bucket/a", None, "did you mean 's3'?"),
        ("sftp://me:secret@host/a", None, r"fsspec\+sftp://"),
        ("fsspec+sftp://me:secret@host/a", None, "stands in the URL"),
        ("fsspec+sftp:host/a", None, "is no folder of a file system"),
        ("fsspec+zip://a::https://host/b", None, "without ::"),
        ("file:", None, "names no folder"),
        ("file://other/a", None, "of another host"),
    ],
)
def test_what_is_no_place_is_refused_and_no_secret_is_shown(text: str, id: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Folder(parse_place(text, id))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [("file:a/b", "a/b"), ("file:/a/b", "/a/b"), ("file:///a%20b", "/a b"), ("file://localhost/a", "/a")],
)
def test_a_folder_is_found(text: str, path: str) -> None:
    assert Folder(parse_place(text)).root == Path(path)
