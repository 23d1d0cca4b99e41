"""Who says that this is their cache: SSH signatures of its id, beside its manifest, made and checked as `ssh-keygen -Y` does.

Signed are the 64 digits of the id, in the namespace "softcache", with an Ed25519 key. A cache may have several signatures: they
stand one after the other in `manifests/ID.sig`. The form is OpenSSH's PROTOCOL.sshsig; allowed signers are listed in a file of
ssh's own form (ssh-keygen(1), ALLOWED SIGNERS).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from softcache.cache.schema import MANIFESTS
from softcache.errors import ConfigError, SignatureError, require_extra
from softcache.files.inside import read_inside

NAMESPACE = "softcache"
KEY_TYPE = "ssh-ed25519"
HASH = "sha512"
MAX_SIGNATURES = 1 << 16  # bytes of a cache's signatures: some two hundred of them
MAX_SIGNERS = 1 << 22  # bytes of a list of allowed signers
_MAGIC = b"SSHSIG"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_ARMOUR = re.compile(f"{_BEGIN}\n(.*?)\n{_END}", re.DOTALL)
_KEY_TYPE = re.compile(r"(?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+")
_OPTION = re.compile(r'(namespaces|valid-after|valid-before|cert-authority)(?:="((?:[^"\\]|\\.)*)")?', re.IGNORECASE)
_TIME = re.compile(r"(\d{8})(\d{4}(?:\d{2})?)?(Z)?")


@dataclass(frozen=True)
class Signature:
    """One signature: the key, and what it signed.

    Attributes:
        key: of KEY_TYPE, in ssh's binary form.
        namespace, hash: as they stand in it.
        value: the 64 bytes of the signature itself.
    """

    key: bytes
    namespace: str
    hash: str
    value: bytes

    @property
    def fingerprint(self) -> str:
        """As ssh shows keys: `SHA256:...`."""
        return fingerprint(self.key)


@dataclass(frozen=True)
class Signer:
    """One line of a list of allowed signers.

    Attributes:
        principals: names that it stands for, as they were written.
        key: in ssh's binary form.
        namespaces: patterns, with `*`, `?` and a `!` in front that forbids; None: any.
        after, before: seconds since 1970 between which the key is good.
    """

    principals: str
    key: bytes
    namespaces: tuple[str, ...] | None = None
    after: float | None = None
    before: float | None = None


def fingerprint(key: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


def signatures_path(id: str) -> str:
    """Where the signatures of a manifest stand, relative to the cache."""
    return f"{MANIFESTS}/{id}.sig"


def read_signatures(path: Path, id: str) -> bytes:
    """The bytes of a cache's signatures; empty where it has none."""
    try:
        return read_inside(path, signatures_path(id), MAX_SIGNATURES)
    except FileNotFoundError:
        return b""


# -------------------------------------------------------------------------------------------------------------------- sign


def sign_id(id: str, key_file: Path) -> tuple[str, str]:
    """A signature of an id by a private key, armoured, and the key's fingerprint.

    Args:
        key_file: an Ed25519 key in OpenSSH's form, without a passphrase.

    Raises:
        ConfigError: no such file, or no such key.
        MissingExtraError: the package cryptography is not installed.
    """
    require_extra("cryptography", "sign", "signing")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    by_hand = f"ssh-keygen asks for it: printf %s {id} | ssh-keygen -Y sign -n {NAMESPACE} -f KEY > manifests/ID.sig"
    makes_one = "ssh-keygen -t ed25519 -f FILE makes one"
    try:
        data = key_file.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"{key_file}: {exc.strerror}", tip="give the file of a private key: ssh-keygen -t ed25519"
        ) from None
    if data.startswith(b"ssh-"):
        raise ConfigError(f"{key_file}: is the public half of a key", tip="give the other file, without .pub")
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError) as exc:
        locked = "password" in str(exc).lower() or "bcrypt" in str(exc).lower()
        what = "is locked by a passphrase" if locked else "is no private key in OpenSSH's form"
        raise ConfigError(f"{key_file}: {what}", tip=by_hand if locked else makes_one) from None
    except Exception as exc:  # a kind of key that cryptography does not know
        raise ConfigError(f"{key_file}: {exc}", tip=makes_one) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: is no Ed25519 key", tip=makes_one)
    public = _string(KEY_TYPE.encode()) + _string(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
    value = key.sign(_signed(id, NAMESPACE, HASH))
    blob = b"".join(
        [_MAGIC, struct.pack(">I", 1), _string(public), _string(NAMESPACE.encode()), _string(b""), _string(HASH.encode()),
         _string(_string(KEY_TYPE.encode()) + _string(value))]
    )  # fmt: skip
    text = base64.b64encode(blob).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join([_BEGIN, *lines, _END, ""]), fingerprint(public)


def _signed(id: str, namespace: str, hash: str) -> bytes:
    """What a key signs of a message, here the digits of an id."""
    digest = hashlib.new(hash, id.encode("ascii")).digest()
    return _MAGIC + _string(namespace.encode()) + _string(b"") + _string(hash.encode()) + _string(digest)


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


# ------------------------------------------------------------------------------------------------------------------- check


def allowed_signers_of(data: bytes, id: str, allowed: Path) -> list[str]:
    """The names of allowed signers whose signature of this id is good, at least one.

    Args:
        data: a cache's signatures.
        allowed: a list of allowed signers.

    Raises:
        SignatureError: none is good; says what is wrong with each.
        ConfigError: the list cannot be read, or a line of it not understood.
        MissingExtraError: the package cryptography is not installed.
    """
    signers = read_signers(allowed)
    require_extra("cryptography", "sign", "checking a signature")
    names, faults = [], []
    for number, found in enumerate(_parsed(data), 1):
        if isinstance(found, Signature):
            name, why = _judged(found, id, signers)
            names += [name] if name else []
            faults += [] if name else [f"signature {number} ({found.fingerprint}): {why}"]
        else:
            faults.append(f"signature {number}: {found}")
    if not names:
        raise SignatureError(
            f"no signer of {allowed} has signed the id {id[:16]}...: " + ("; ".join(faults) or "it has no signature"),
            tip="ask whoever made the cache to sign it: softcache sign CACHE --key FILE",
        )
    return list(dict.fromkeys(names))


def _judged(found: Signature, id: str, signers: list[Signer]) -> tuple[str, str]:
    """(the signer's name, "") of a good signature; ("", why not)."""
    if found.namespace != NAMESPACE:
        return "", f"was made for {found.namespace!r}, not for {NAMESPACE!r}"
    known = [one for one in signers if one.key == found.key]
    if not known:
        return "", "its key is not in the list"
    allowed = [one for one in known if one.namespaces is None or _matches(NAMESPACE, one.namespaces)]
    if not allowed:
        return "", f"the list does not allow its key for {NAMESPACE!r}"
    now = time.time()
    timely = [
        one for one in allowed if (one.after is None or one.after <= now) and (one.before is None or now <= one.before)
    ]
    if not timely:
        return "", "the list allows its key at another time"
    if not _is_good(found, id):
        return "", "is not of this id, or was changed"
    return timely[0].principals, ""


def _is_good(found: Signature, id: str) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(found.key[-32:]).verify(
            found.value, _signed(id, found.namespace, found.hash)
        )
    except InvalidSignature:
        return False
    return True


def merged(*several: bytes) -> bytes:
    """All signatures of several files, each once; whatever else stands in them is left out."""
    texts = (data.decode("ascii", "replace").replace("\r\n", "\n") for data in several)
    whole = b""
    for block in dict.fromkeys(block for text in texts for block in _ARMOUR.findall(text)):
        one = f"{_BEGIN}\n{block}\n{_END}\n".encode("ascii", "replace")
        if len(whole) + len(one) <= MAX_SIGNATURES:
            whole += one
    return whole


def count_of(data: bytes) -> int:
    """How many signatures a file holds, good or not."""
    return sum(1 for _ in _parsed(data))


def _parsed(data: bytes) -> Iterator[Signature | str]:
    """Each signature of a file, or what is wrong with it."""
    try:
        text = data.decode("ascii").replace("\r\n", "\n")
    except UnicodeDecodeError:
        yield "is no text"
        return
    for armoured in _ARMOUR.findall(text):
        try:
            yield _signature(base64.b64decode("".join(armoured.split()), validate=True))
        except (ValueError, binascii.Error, UnicodeDecodeError) as exc:
            yield f"cannot be read ({exc})"


def _signature(blob: bytes) -> Signature:
    """Of its binary form; ValueError for any other."""
    if not blob.startswith(_MAGIC) or blob[6:10] != struct.pack(">I", 1):
        raise ValueError("is not of version 1")
    key, namespace, reserved, hash, signature = _strings(blob[10:], 5)
    if hash not in (b"sha256", b"sha512"):
        raise ValueError("uses another hash than sha256 or sha512")
    _check_key(key)
    kind, value = _strings(signature, 2)
    if kind != KEY_TYPE.encode() or len(value) != 64 or reserved:
        raise ValueError("is no Ed25519 signature")
    return Signature(key, namespace.decode("utf-8"), hash.decode(), value)


def _check_key(key: bytes) -> None:
    kind, *rest = _strings(key, None)
    if kind != KEY_TYPE.encode():
        raise ValueError(f"is by a key of type {kind[:40].decode('ascii', 'replace')}; softcache checks {KEY_TYPE}")
    if len(rest) != 1 or len(rest[0]) != 32:
        raise ValueError("has no Ed25519 key")


def _strings(data: bytes, count: int | None) -> list[bytes]:
    """The strings that bytes consist of; ValueError unless they are as many, and nothing else."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 4 + size > len(data) or at + 4 > len(data):
            raise ValueError("ends too early")
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if not found or (count is not None and len(found) != count):
        raise ValueError("has another number of parts")
    return found


# ----------------------------------------------------------------------------------------------------------------- signers


def read_signers(path: Path) -> list[Signer]:
    """The Ed25519 keys of a list of allowed signers; keys of other kinds are left out.

    Raises:
        ConfigError: it cannot be read, or a line is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIGNERS + 1)
        text = data.decode("utf-8", "surrogateescape")  # a comment may be anything
    except OSError as exc:
        raise ConfigError(
            f"{path}: {exc.strerror}", tip="a list of signers has lines as: alice@example.org ssh-ed25519 AAAA..."
        ) from None
    if len(data) > MAX_SIGNERS:
        raise ConfigError(f"{path}: is too long for a list of signers")
    signers: list[Signer] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                signers += _signer(line.removesuffix("\r"))
            except ValueError as exc:
                raise ConfigError(
                    f"{path}, line {number}: {exc}",
                    tip="a line is: NAMES [OPTIONS] ssh-ed25519 AAAA..., as ssh-keygen(1) says",
                ) from None
    return signers


def _signer(line: str) -> Iterator[Signer]:
    """Of one line, as ssh reads it: principals, options in one word, the kind of key, the key; what follows is a comment."""
    principals, rest = _word(line.lstrip(" \t"))
    if not principals:
        raise ValueError("names nobody")
    options: dict[str, str] = {}
    if rest and not _KEY_TYPE.match(rest):
        options, rest = _options(rest)
    words = rest.split(None, 2)
    if len(words) < 2 or not _KEY_TYPE.fullmatch(words[0]):
        raise ValueError("has no key")
    if words[0] != KEY_TYPE or "cert-authority" in options:
        return
    try:
        key = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        raise ValueError("its key is not base64") from None
    _check_key(key)
    spaces = tuple(options["namespaces"].split(",")) if "namespaces" in options else None
    yield Signer(principals, key, spaces, _seconds(options.get("valid-after")), _seconds(options.get("valid-before")))


def _word(text: str) -> tuple[str, str]:
    """The first word, which may stand in double quotes, and what follows it."""
    if text.startswith('"'):
        word, quote, rest = text[1:].partition('"')
        if not quote:
            raise ValueError("a quote is not closed")
        return word, rest.lstrip(" \t")
    word, *more = text.split(None, 1)
    return word, more[0] if more else ""


def _options(text: str) -> tuple[dict[str, str], str]:
    """`namespaces="a,b",valid-after="20260101"` at the beginning, each at most once, and what follows them."""
    found: dict[str, str] = {}
    while True:
        option = _OPTION.match(text)
        if option is None:
            raise ValueError("has no key, or an option that ssh does not know")
        name = option[1].lower()
        if name in found:
            raise ValueError(f"has {name} twice")
        if (name == "cert-authority") != (option[2] is None):
            raise ValueError(f"{name} is written " + ("alone" if name == "cert-authority" else f'{name}="..."'))
        found[name] = (option[2] or "").replace('\\"', '"')
        text = text[option.end() :]
        if not text.startswith(","):
            if text[:1] not in (" ", "\t"):
                raise ValueError(f"what follows {name} is no option")
            return found, text.lstrip(" \t")
        text = text[1:]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a list of patterns has a name: one of them must, and none with a `!`."""
    found = False
    for pattern in patterns:
        one = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern.removeprefix("!"))
        if re.fullmatch(one, name, re.DOTALL):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _seconds(text: str | None) -> float | None:
    """Of YYYYMMDD[HHMM[SS]][Z]: local time, or of UTC with a Z."""
    if text is None:
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time of the form YYYYMMDD[HHMM[SS]][Z]")
    clock = (found[2] or "0000").ljust(6, "0")
    try:
        when = datetime.strptime(found[1] + clock, "%Y%m%d%H%M%S")
    except ValueError:
        raise ValueError(f"{text!r} is no time") from None
    seconds = when.replace(tzinfo=UTC).timestamp() if found[3] else when.timestamp()
    if seconds <= 0:
        raise ValueError(f"{text!r} is before 1970")
    return seconds
