"""Does a dump survive whatever a machine can do to it? Kills, power cuts, faults of every system call, full disks, crowds.

    python tools/faults kill --count 1000         SIGKILL at random times, and after every call of the file layer
    python tools/faults kill --full-command 20    the same for `python -m softcache dump`
    python tools/faults prefixes                  every prefix of the calls, under a model of what survives a power cut
    python tools/faults strace                    are the recorded calls all that the kernel sees?
    python tools/faults errno                     ENOSPC, EDQUOT, EIO, EROFS, EACCES, EINTR, short writes: at every call
    python tools/faults fulldisk                  a really full small file system, at many fill levels
    python tools/faults many                      8 dumpers and 16 readers on one folder
    python tools/faults term --count 50           SIGTERM of `softcache train`, on one process and two, with workers and without
    python tools/faults pulls --count 1000        `softcache pull` from a web server that does wrong
    python tools/faults pulls --hub --count 1000  the same from a hub of our own
    python tools/faults pulls --kill --count 100  SIGKILL of it at random times
    python tools/faults buckets --count 20        push and pull by obstore against moto, installed for it (extra cloud)
    python tools/faults --quick                   a few trials of each; `kill --quick`: of one
    python tools/faults kill --format 2           of version 2 (prefixes and errno too): indexes, lists, embeddings

The writer is small, torch-free and deterministic: two members, views, dense rows, constants, a probe, two parts, and an
extension by one view. After whatever happened a reader must meet the old cache, the new one, or "unfinished"; nothing that
was finished may be lost; and the same call must end in the bytes of an undisturbed run. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.crowd import many
from faults.failing_calls import errnos
from faults.fulldisk import fill_up, fulldisk
from faults.kill import kill, kill_full_command
from faults.prefixes import prefixes
from faults.pulls import killed_pulls, pulls
from faults.report import Report
from faults.small_dump import use
from faults.strace import may_trace, record_of, strace
from faults.term import term
from faults.watched import Call, one_of_each

COMMANDS = ("kill", "prefixes", "strace", "errno", "fulldisk", "many", "term", "pulls")
OF_A_REGISTRY = ("buckets",)  # they ask a registry for what they need, and are run by name alone
OF_BOTH = ("kill", "prefixes", "errno")  # versions of the format
MEMORY = Path("/dev/shm")  # an fsync costs nothing there


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.command is None:
        known = [name for name in COMMANDS if name != "strace" or may_trace()]
        if len(known) < len(COMMANDS):
            print("strace is not installed, or not allowed: left out")
        where = ["--folder", arguments.folder] if arguments.folder else []
        return max(main([*where, name, "--quick"]) for name in known)
    if arguments.command == "write":
        arguments.path.mkdir()
        arguments.record.write_text(json.dumps(record_of(arguments.path)))
        return 0
    memory = MEMORY if arguments.quick and os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="softcache-faults-", dir=arguments.folder or memory) as folder:
        report = run(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(vars(report)))
    else:
        print(table([report.name, ""], [[name, f"{count:,}"] for name, count in report.counts.items()]))
        print(f"{len(report.failures)} failures")
        for failure in report.failures[:20]:
            print(f"FAILED {failure}")
    return 1 if report.failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the caches are made (default: a temporary one, in memory for --quick)")
    parser.add_argument("--quick", action="store_true", dest="each", help="a few trials of each sub-command")
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    subs = {name: commands.add_parser(name) for name in (*COMMANDS, *OF_A_REGISTRY, "write")}
    for sub in subs.values():
        sub.add_argument("--quick", action="store_true", help="a few trials")
        sub.add_argument("--json", action="store_true", help="the counts for machines")
        sub.add_argument("--seed", type=int, default=0)
    for name in OF_BOTH:
        subs[name].add_argument("--format", type=int, choices=(1, 2), default=1)
    subs["kill"].add_argument("--count", type=int, default=1000)
    subs["kill"].add_argument("--full-command", type=int, metavar="N", help="kill `softcache dump` N times instead")
    subs["fulldisk"].add_argument("--steps", type=int, default=60)
    subs["fulldisk"].add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    subs["many"].add_argument("--dumpers", type=int, default=8)
    subs["many"].add_argument("--readers", type=int, default=16)
    subs["term"].add_argument("--count", type=int, default=50)
    subs["pulls"].add_argument("--count", type=int, default=1000)
    subs["pulls"].add_argument("--kill", action="store_true", help="kill it instead")
    subs["pulls"].add_argument("--hub", action="store_true", help="from a hub of our own")
    subs["buckets"].add_argument("--count", type=int, default=20)
    subs["buckets"].add_argument("--moto", type=Path, help="an environment that has moto[server] already")
    subs["write"].add_argument("path", type=Path)
    subs["write"].add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.command is None and not arguments.each:
        parser.error(f"say which of {', '.join(COMMANDS)}; or --quick, for a few trials of each")
    return arguments


def run(arguments: argparse.Namespace, root: Path) -> Report:
    quick = arguments.quick
    use(getattr(arguments, "format", 1))
    if arguments.command == "kill" and arguments.full_command:
        return kill_full_command(root, 1 if quick else arguments.full_command, arguments.seed)
    if arguments.command == "kill":
        return kill(root, 4 if quick else arguments.count, arguments.seed)
    if arguments.command == "prefixes":
        return prefixes(root, arguments.seed, **({"at": few, "resumed_at": few} if quick else {}))
    if arguments.command == "strace":
        return strace(root)
    if arguments.command == "errno":
        return errnos(root, at=few, in_turn=True) if quick else errnos(root)
    if arguments.command == "fulldisk":
        steps = 3 if quick else arguments.steps
        return fill_up(arguments.inside, steps) if arguments.inside else fulldisk(root, steps)
    if arguments.command == "term":
        return term(root, 4 if quick else arguments.count, arguments.seed)
    if arguments.command == "pulls":
        count = 4 if quick else arguments.count
        if arguments.kill:
            return killed_pulls(root, count, arguments.seed)
        return pulls(root, count, arguments.seed, hub=arguments.hub)
    if arguments.command == "buckets":
        from faults.buckets import buckets

        return buckets(root, 1 if quick else arguments.count, arguments.seed, arguments.moto)
    return many(root, 4, 3) if quick else many(root, arguments.dumpers, arguments.readers)


def few(calls: Sequence[Call]) -> Sequence[int]:
    """One in thirty of the calls that are the last of their kind."""
    return one_of_each(calls)[::30]


if __name__ == "__main__":
    sys.exit(main())
