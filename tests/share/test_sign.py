"""Signatures of a cache's id are those of ssh-keygen, and only the right ones of allowed signers are taken."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import needs
from signing import Key

from softcache import cli
from softcache.cache import signatures
from softcache.cache.manifest import read_manifest
from softcache.cache.schema import MANIFEST
from softcache.cache.signatures import allowed_signers_of, count_of, read_signatures, sign_id, signatures_path
from softcache.check import verify
from softcache.errors import ConfigError, SignatureError
from softcache.remote.places import parse_place
from softcache.share import pull, push, sign, subset

pytestmark = needs("cryptography", "sign")

GOLDEN = Path(__file__).parents[1] / "golden"
ID = "0123456789abcdef" * 4
# made by OpenSSH 9.2: printf %s ID | ssh-keygen -Y sign -n softcache -f KEY
ALICE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAID9QSgCtAPv23RiEcx+vwvGzuqhILnbdh0wVkZlXIGNz"
BY_SSH = """-----BEGIN SSH SIGNATURE-----
U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgP1BKAK0A+/bdGIRzH6/C8bO6qE
gudt2HTBWRmVcgY3MAAAAJc29mdGNhY2hlAAAAAAAAAAZzaGE1MTIAAABTAAAAC3NzaC1l
ZDI1NTE5AAAAQFKzvKXWBsjK3gC9OIAp/iG2boOs8L/T4i8OTBwJ/9sBeGjaSHRv5H7BnQ
IMZD3NQ6nw9BKYtai7KVAXmWNVmwE=
-----END SSH SIGNATURE-----
"""
DAY = 86400.0


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "own")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "indexed", tmp_path / "cache"))


def listed(folder: Path, *lines: str) -> Path:
    path = folder / "signers"
    path.write_text("\n".join(["# who may", "", *lines, ""]))
    return path


def test_a_signature_of_ssh_is_taken(tmp_path: Path) -> None:
    signers = listed(tmp_path, f"alice@example.org {ALICE} a comment", "bob ssh-rsa AAAAB3NzaC1yc2E=")
    assert allowed_signers_of(BY_SSH.encode(), ID, signers) == ["alice@example.org"]
    assert allowed_signers_of(BY_SSH.replace("\n", "\r\n").encode(), ID, signers) == ["alice@example.org"]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_ssh_takes_ours_and_we_take_its(tmp_path: Path, key: Key) -> None:
    armoured, fingerprint = sign_id(ID, key.file)
    (tmp_path / "sig").write_text(armoured)
    signers = listed(tmp_path, f'carol namespaces="softcache,git" {key.public}')
    ssh = [
        "ssh-keygen",
        "-Y",
        "verify",
        "-n",
        "softcache",
        "-I",
        "carol",
        "-f",
        str(signers),
        "-s",
        str(tmp_path / "sig"),
    ]
    done = subprocess.run(ssh, input=ID, capture_output=True, text=True)
    assert done.returncode == 0 and fingerprint in done.stdout, done.stderr
    assert subprocess.run(ssh, input=ID[:-1] + "0", capture_output=True, text=True).returncode != 0
    own = ["ssh-keygen", "-Y", "sign", "-n", "softcache", "-f", str(key.file)]
    for extra in ([], ["-O", "hashalg=sha256"]):
        theirs = subprocess.run([*own, *extra], input=ID, capture_output=True, text=True, check=True).stdout
        assert allowed_signers_of(theirs.encode(), ID, signers) == ["carol"]


def flipped(text: str, byte: int) -> str:
    """The signature with one bit of its binary form changed."""
    lines = text.strip().split("\n")
    blob = bytearray(base64.b64decode("".join(lines[1:-1])))
    blob[byte] ^= 1
    return "\n".join([lines[0], base64.b64encode(blob).decode(), lines[-1], ""])


@pytest.mark.parametrize("byte", range(len(base64.b64decode("".join(BY_SSH.split("\n")[1:-2])))))
def test_no_flipped_bit_is_taken(tmp_path: Path, byte: int) -> None:
    with pytest.raises(SignatureError, match="no signer of"):
        allowed_signers_of(flipped(BY_SSH, byte).encode(), ID, listed(tmp_path, f"alice {ALICE}"))


@pytest.mark.parametrize(
    ("id", "line", "why"),
    [
        (ID[:-1] + "0", f"alice {ALICE}", "is not of this id, or was changed"),
        (
            ID,
            "bob ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "is not in the list",
        ),
        (ID, f'alice namespaces="git" {ALICE}', "does not allow its key for 'softcache'"),
        (ID, f'alice namespaces="*,!softcache" {ALICE}', "does not allow its key for 'softcache'"),
        (ID, f'alice namespaces="" {ALICE}', "does not allow its key for 'softcache'"),
        (ID, f'alice namespaces="[s]oftcache" {ALICE}', "does not allow its key for 'softcache'"),
        (ID, f'alice namespaces="git, softcache" {ALICE}', "does not allow its key for 'softcache'"),
        (ID, f'alice valid-before="20200101" {ALICE}', "at another time"),
        (ID, f'alice valid-after="29990101Z" {ALICE}', "at another time"),
        (ID, f"alice cert-authority {ALICE}", "is not in the list"),
    ],
)
def test_who_is_not_allowed_is_refused(tmp_path: Path, id: str, line: str, why: str) -> None:
    with pytest.raises(SignatureError, match=why):
        allowed_signers_of(BY_SSH.encode(), id, listed(tmp_path, line))


@pytest.mark.parametrize(
    "line",
    [
        f'alice namespaces="soft*" {ALICE}',
        f'"alice,al ice" valid-after="20200101",valid-before="29990101120000Z" {ALICE} alice\'s laptop "',
        f'o\'brien Namespaces="git,softcache",valid-before="29990101" {ALICE}',
        f"alice cert-authority {ALICE}\nalice {ALICE}",
    ],
)
def test_who_is_allowed_is_taken(tmp_path: Path, line: str) -> None:
    assert len(allowed_signers_of(BY_SSH.encode(), ID, listed(tmp_path, line))) == 1


def test_a_time_of_a_list_is_local_or_of_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for text, seconds in (
            ("20260102", 1767279600.0),
            ("202601020304Z", 1767323040.0),
            ("20260102030405", 1767290645.0),
        ):
            (signer,) = signatures.read_signers(listed(tmp_path, f'alice valid-after="{text}" {ALICE}'))
            assert signer.after == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alice", "line 3: has no key"),
        ("alice ssh-ed25519", "has no key"),
        ("alice ssh-ed25519 !!!!", "not base64"),
        ("alice ssh-ed25519 AAAA", "has another number of parts|ends too early|key of type"),
        (f"alice colour=red {ALICE}", "an option that ssh does not know"),
        (f'alice valid-before="tomorrow" {ALICE}', "no time of the form"),
        (f'alice valid-before="20261301" {ALICE}', "is no time"),
        (f'alice valid-before="19700101Z" {ALICE}', "before 1970"),
        (f'alice valid-before="20200101",valid-before="29990101" {ALICE}', "has valid-before twice"),
        (f'alice namespaces="git", {ALICE}', "an option that ssh does not know"),
        (f'"alice {ALICE}', "a quote is not closed"),
        (f'alice namespaces="git {ALICE}', "is written namespaces"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allowed_signers_of(BY_SSH.encode(), ID, listed(tmp_path, line))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"hello",
        BY_SSH[:120].encode(),
        BY_SSH.replace("U1NI", "U1NJ").encode(),
        BY_SSH.replace("A", "").encode(),
    ],
)
def test_what_is_no_signature_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SignatureError, match="no signer of"):
        allowed_signers_of(data, ID, listed(tmp_path, f"alice {ALICE}"))


def test_a_cache_is_signed_by_several_and_checked(cache: Path, key: Key, tmp_path: Path) -> None:
    id = read_manifest(cache).id
    assert sign.run(cache, key.file)[0] == id
    once = read_signatures(cache, id)
    sign.run(cache, key.file)
    assert read_signatures(cache, id) == once
    other = Key(tmp_path / "other")
    sign.run(cache, other.file)
    assert count_of(read_signatures(cache, id)) == 2
    signers = listed(tmp_path, f"dave {other.public}")
    verdict = verify.run(cache, full=True, quiet=True, signed_by=signers)
    assert verdict.exit_code == 0 and verdict.notes == ["signed by dave"]
    assert verify.run(cache, full=True, quiet=True).notes == ["2 signatures, not looked at: --signed-by FILE"]
    with pytest.raises(SignatureError, match="its key is not in the list"):
        verify.run(cache, full=True, quiet=True, signed_by=listed(tmp_path, f"alice {ALICE}"))
    subset.run(cache, tmp_path / "less", subset.Choice(views="0"), quiet=True)
    assert not list((tmp_path / "less" / "manifests").glob("*.sig"))


def test_signatures_travel_and_are_asked_for_before_the_first_file(cache: Path, key: Key, tmp_path: Path) -> None:
    there, signers = parse_place(f"file:{tmp_path / 'there'}"), listed(tmp_path, f"carol {key.public}")
    push.run(cache, there, quiet=True)
    with pytest.raises(SignatureError, match="it has no signature"):
        pull.run(there, tmp_path / "a", signed_by=signers, quiet=True)
    assert not (tmp_path / "a").exists()
    id, _ = sign.run(cache, key.file)
    assert push.run(cache, there, quiet=True).sent_files == 0
    manifest, _, names = pull.run(there, tmp_path / "a", signed_by=signers, quiet=True)
    assert (manifest.id, names) == (id, ("carol",))
    assert (tmp_path / "a" / signatures_path(id)).read_bytes() == read_signatures(cache, id)
    assert verify.run(tmp_path / "a", full=True, quiet=True, signed_by=signers).exit_code == 0
    with (tmp_path / "there" / MANIFEST).open("ab") as file:
        file.write(b" ")
    with pytest.raises(SignatureError, match="it has no signature"):  # other bytes have another id
        pull.run(there, tmp_path / "b", signed_by=signers, quiet=True)
    assert not (tmp_path / "b").exists()


def test_signatures_of_several_people_meet(cache: Path, key: Key, tmp_path: Path) -> None:
    place, other = parse_place(f"file:{tmp_path / 'there'}"), Key(tmp_path / "other")
    push.run(cache, place, quiet=True)
    for name, who in (("a", key), ("b", other)):
        pull.run(place, tmp_path / name, quiet=True)
        sign.run(tmp_path / name, who.file)
    for name in ("a", "b"):
        push.run(tmp_path / name, place, quiet=True)
    id = read_manifest(cache).id
    assert count_of(read_signatures(tmp_path / "there", id)) == 2
    pull.run(place, tmp_path / "a", quiet=True)
    assert count_of(read_signatures(tmp_path / "a", id)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"ssh-ed25519 AAAA", "public half"),
        (b"hello", "no private key in OpenSSH's form"),
        ("locked", "locked by a passphrase"),
        ("rsa", "no Ed25519 key"),
    ],
)
def test_a_key_that_cannot_sign_is_refused(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    file = tmp_path / "key"
    if content == "rsa":
        made = rsa.generate_private_key(65537, 2048)
        content = made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    elif content == "locked":
        if shutil.which("ssh-keygen") is None:
            pytest.skip("there is no ssh-keygen")
        made_by = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "a secret", "-f", str(file)]
        subprocess.run(made_by, check=True, capture_output=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        sign_id(ID, file)


def test_on_the_command_line(cache: Path, key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signers = listed(tmp_path, f"carol {key.public}")
    assert cli.main(["sign", str(cache), "--key", str(key.file)]) == 0
    assert "ssh-keygen -Y verify" in capsys.readouterr().out
    assert cli.main(["verify", str(cache), "--full", "--signed-by", str(signers)]) == 0
    assert "signed by carol" in capsys.readouterr().out
    assert cli.main(["verify", str(cache), "--signed-by", str(listed(tmp_path, f"alice {ALICE}"))]) == 2
    assert "tip: ask whoever made the cache to sign it" in capsys.readouterr().err
