"""softcache store: what it shows, what it removes, and what it does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import softcache
from softcache import cli
from softcache.commands.store import bytes_of
from softcache.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCACHE_HOME", str(tmp_path / "home"))


@pytest.mark.slow
def test_it_lists_and_removes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["store", "list"]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    url = f"file:{GOLDEN / 'v1' / 'int8'}"
    script = f"import softcache, numpy as np; softcache.open({url!r}).gather(np.array([0]), np.array([0]))"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)  # and it ends
    used = softcache.open(f"file:{GOLDEN / 'v1' / 'float16'}", quiet=True)
    len(used)
    assert cli.main(["store", "list", "--json"]) == 0
    found = {one["url"]: one for one in json.loads(capsys.readouterr().out)["caches"]}
    one = found[url]
    assert one["in_use"] is False and found[f"file:{GOLDEN / 'v1' / 'float16'}"]["in_use"] is True
    assert 0 < one["bytes_here"] <= one["bytes"] == softcache.open(GOLDEN / "v1" / "int8").manifest.nbytes
    assert cli.main(["store"]) == 0
    text = capsys.readouterr().out
    assert url in text and one["id"][:16] in text and "at most 100 GiB are kept" in text
    assert cli.main(["store", "prune", "0" * 16]) == 2
    assert "is not in the store" in capsys.readouterr().err
    assert cli.main(["store", "prune", used.id[:16]]) == 2  # it is open
    assert cli.main(["store", "prune", "--older", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["removed"] == []
    assert cli.main(["store", "prune", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["removed"] == [one["id"]] and told["bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "--keep", "1GB"], "belongs to `softcache store prune`"),
        (["prune", "abc", "--keep", "1GB"], "cannot be given together"),
        (["prune", "--older", "-1"], "is no number of days"),
        (["prune", "--keep", "much"], "is no size"),
        (["empty"], "empty"),
    ],
    ids=str,
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["store", *words]) == 2
    assert message in capsys.readouterr().err


def test_sizes_have_units() -> None:
    assert [bytes_of(text) for text in ("5", "1.5GB", "2MiB", "1 TB")] == [5, 1_500_000_000, 2**21, 10**12]
    with pytest.raises(ConfigError):
        bytes_of("-1GB")


def test_what_moves_and_keeps_caches_loads_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom softcache import cli\n"
        f"assert cli.main(['push', {str(GOLDEN / 'v1' / 'int8')!r}, 'file:{tmp_path}/there']) == 0\n"
        f"assert cli.main(['pull', 'file:{tmp_path}/there', {str(tmp_path / 'here')!r}]) == 0\n"
        "assert cli.main(['store', 'list']) == 0\nassert cli.main(['store', 'prune']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
