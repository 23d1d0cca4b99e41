"""What a web server, its proxy or ~/.netrc does is told as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.errors import RemoteError
from softcache.remote import patience
from softcache.remote.fetch import read_small
from softcache.remote.places import parse_place
from softcache.remote.web import Web


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "NOBODY_S", 0.0)
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def error_of(url: str) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        read_small(Web(parse_place(url)), "manifest.json", 100)
    return caught.value


def test_a_proxy_that_is_down_is_told_as_that_and_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nobody answers there" in error_of("http://127.0.0.1:9/a").message
    monkeypatch.setenv("http_proxy", "http://me:geheim@127.0.0.1:9")
    error = error_of("http://data.example.org/a")
    assert "nobody answers at '127.0.0.1', the proxy of the environment" in error.message
    assert "geheim" not in repr(error)
    monkeypatch.setenv("http_proxy", "http://me:geheim@no-such-host.invalid:9")
    assert "there is no host 'no-such-host.invalid', the proxy" in error_of("http://data.example.org/a").message
    monkeypatch.setenv("no_proxy", "no-such-data.invalid")
    assert "there is no host 'no-such-data.invalid';" in error_of("http://no-such-data.invalid/a").message


def test_what_netrc_has_is_used_over_https_and_what_keeps_it_from_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".netrc"
    tip = Web(parse_place("https://host/a"))._access.tip
    assert tip == "put the name and password of the host into ~/.netrc"
    file.write_text("machine host login me password geheim\n")
    file.chmod(0o600)
    access = Web(parse_place("https://host/a"))._access
    assert access.header == "Basic bWU6Z2VoZWlt" and "geheim" not in repr(access) and "bWU6" not in repr(access)
    plain = Web(parse_place("http://host/a"))._access
    assert plain.header is None and "over https: only" in plain.tip
    file.chmod(0o644)
    others = Web(parse_place("https://host/a"))._access
    assert others.header is None and "~/.netrc was passed over" in others.tip
