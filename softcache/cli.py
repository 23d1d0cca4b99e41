"""The command line: one sub-command per verb; the only place that prints errors and sets exit codes.

Nothing here imports torch before a verb runs, so that --help is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softcache.config import DumpConfig, EvalConfig, ExportConfig, PlanConfig, TrainConfig, flag_of, resolve
from softcache.errors import ConfigError, SoftcacheError, printable
from softcache.version import __version__

EXIT_USER, EXIT_INTERRUPT, EXIT_TERMINATED = 2, 130, 143

EXAMPLES = {
    "demo": """
  softcache demo
  softcache demo --out my-demo --seeds 0,1,2""",
    "dump": """
  softcache dump --data digits --teacher runs/teacher --out caches/digits
  softcache dump --data torchvision:MNIST?root=data --teacher softcache:mlp?hidden=1200,1200@runs/teacher \\
                 --teacher runs/second --policy shift:pixels=2 --views 8 --codec float16 --out caches/mnist
  torchrun --nproc-per-node 4 -m softcache dump --data imagefolder:train --teacher torchvision:resnet50@IMAGENET1K_V2 ...
  softcache dump ... --part 1/3        (and 2/3, 3/3, as a job array)
  softcache dump --extend --out caches/mnist --data torchvision:MNIST?root=data --teacher ... --views 16
  softcache dump --data digits --teacher runs/teacher --features layers.0:flatten --codec int8 --out caches/features
  softcache dump --data digits --teacher runs/teacher --for at,crd,dkd --out caches/for-losses
  softcache dump --data digits --teacher runs/teacher --out caches/any --list-modules""",
    "plan": """
  softcache plan --data digits --teacher runs/teacher --policy shift:pixels=1 --views 8
  softcache plan --data imagefolder:train --teacher torchvision:resnet50@IMAGENET1K_V2 --max-kl 1e-3 --at-temperature 4""",
    "train": """
  softcache train --data digits --student softcache:mlp?hidden=64,64 --loss ce --epochs 20 --out runs/hard
  softcache train --cache caches/digits --data digits --eval-data digits?split=test \\
                  --student softcache:mlp?hidden=64,64 --loss kd:temperature=4,weight=0.9 --loss ce:weight=0.1 --out runs/s""",
    "eval": """
  softcache eval runs/s --data digits?split=test
  softcache eval runs/s --data digits --cache caches/digits --temperature 4
  softcache eval caches/digits --data digits --combine mean_probs""",
    "export": """
  softcache export runs/s --to onnx
  softcache export runs/s --to program --data digits?split=test --out student.pt2
  softcache export softcache:cnn@weights.pt --to safetensors --data digits?split=test --out cnn.safetensors""",
    "reproduce": """
  softcache reproduce LIST
  softcache reproduce digits
  softcache reproduce hinton2015-mnist --data-root data --budget short --seeds 0,1,2""",
    "losses": """
  softcache losses
  softcache losses dkd
  softcache losses --json""",
    "inspect": """
  softcache inspect caches/digits
  softcache inspect caches/digits --sample digits/000001""",
    "views": """
  softcache views caches/digits --sample digits/000001 --out views.png""",
    "verify": """
  softcache verify caches/digits --quick
  softcache verify caches/digits --full --json
  softcache verify caches/digits --replay 1000""",
    "repair": """
  softcache repair caches/digits
  softcache repair caches/digits --from /backup/digits
  softcache repair caches/digits --data digits --teacher runs/teacher""",
    "subset": """
  softcache subset caches/mnist caches/mnist-first --views 0-3
  softcache subset caches/mnist caches/mnist-few --members teacher --keep-labels 0-4 --license cc-by-4.0
  softcache subset caches/mnist caches/mnist-some --samples keys.txt --json""",
}

SUMMARIES = {
    "demo": "the whole main job on scikit-learn's digits: teachers, one dump, students with and without the cache",
    "dump": "run a teacher or an ensemble once over a transfer set and write its logits to a cache",
    "plan": "what a dump would cost and keep: size, time and fidelity of every codec, before it is paid for",
    "train": "train a student from a cache, or on hard labels without one",
    "eval": "measure a model: accuracy, likelihood, calibration, closeness to a cache",
    "export": "write a model as safetensors, torch.export program or ONNX, verified by running it on an evaluation set",
    "reproduce": "a paper's table again, from shared caches: ours beside the paper's numbers, with spread and verdict",
    "losses": "the losses a student can learn by: what they need of a cache, their settings, their papers",
    "inspect": "what made this cache, from what, how big; one sample's soft target as bars",
    "views": "a picture of what the teacher saw of one sample, and of what it answered",
    "verify": "is this cache whole? exit code 0 whole, 1 damaged, 3 unfinished",
    "repair": "make damaged or missing files again, and prove that they are the same bytes",
    "subset": "write some views, members or samples of a cache as a smaller cache of its own",
}


class _Terminated(BaseException):
    """SIGTERM, raised where the main thread is, so that everything is left as after Ctrl-C."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message, tip=f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _raise_terminated)
    except ValueError:  # not the main thread: somebody else's signals
        previous = None
    try:
        arguments = _build_parser().parse_args(argv)
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except SoftcacheError as exc:
        print(f"softcache: error: {printable(exc.message)}", file=sys.stderr)
        for note in getattr(exc, "__notes__", []):
            print(f"  {printable(note)}", file=sys.stderr)
        if exc.tip:
            print(f"  tip: {printable(exc.tip)}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("\nsoftcache: interrupted; the same command resumes where it stopped", file=sys.stderr)
        return EXIT_INTERRUPT
    except _Terminated:
        print("\nsoftcache: terminated; the same command resumes where it stopped", file=sys.stderr)
        return EXIT_TERMINATED
    except BrokenPipeError:  # the reader of our output has gone: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER
    except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
        print(f"softcache: error: {exc.filename}: {exc.strerror}", file=sys.stderr)
        return EXIT_USER
    except OSError as exc:
        import errno

        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"softcache: error: {exc.filename or 'writing'}: {exc.strerror}", file=sys.stderr)
        print("  tip: free some space and run the same command again", file=sys.stderr)
        return EXIT_USER
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _raise_terminated(signum: int, frame: Any) -> None:
    raise _Terminated


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softcache",
        description="Run the teacher once, train any number of students: an offline soft-target cache for distillation.",
        epilog="examples:\n  softcache demo\n  softcache dump --help\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"softcache {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    demo = _verb(verbs, "demo", _demo)
    demo.add_argument("--out", default="softcache-demo", help="folder for teachers, cache, students and the picture")
    demo.add_argument("--seeds", default="0,1,2,3,4", help="seeds of the students")
    _config_verb(verbs, "plan", PlanConfig, _plan)
    _config_verb(verbs, "dump", DumpConfig, _dump)
    _config_verb(verbs, "train", TrainConfig, _train)
    _config_verb(verbs, "eval", EvalConfig, _eval).add_argument("model", help="run folder, MODEL@WEIGHTS or a cache")
    _config_verb(verbs, "export", ExportConfig, _export).add_argument("model", help="run folder or MODEL@WEIGHTS")
    reproduce = _verb(verbs, "reproduce", _reproduce)
    reproduce.add_argument("recipe", metavar="NAME", help="of a recipe, or its .toml file; LIST shows them")
    reproduce.add_argument(
        "--budget", default="paper", metavar="{smoke,short,paper}", help="how much of it (default: paper)"
    )
    reproduce.add_argument("--data-root", default="data", metavar="DIR", help="where the data sets are (default: data)")
    reproduce.add_argument(
        "--data", action="append", default=[], metavar="NAME=SPEC", help="another source of the recipe's data; repeat"
    )
    reproduce.add_argument(
        "--use", action="append", default=[], metavar="STEP=MODEL", help="a model in the place of one it trains; repeat"
    )
    reproduce.add_argument("--seeds", metavar="N,N", help="of the students (default: the recipe's)")
    reproduce.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STEPS",
        help="these steps and what they build on: 'vgg13-*'; repeat",
    )
    reproduce.add_argument("--device", metavar="DEVICE", help="for every step (default: a GPU where there is one)")
    reproduce.add_argument("--out", default="reproduced", metavar="DIR", help="for runs, caches and the table")
    reproduce.add_argument("--download", action="store_true", help="let torchvision download what is not in DIR")
    reproduce.add_argument("--quiet", action="store_true", help="no progress")
    reproduce.add_argument("--json", action="store_true", help="the table for machines")
    losses = _verb(verbs, "losses", _losses)
    losses.add_argument("name", nargs="?", metavar="LOSS", help="explain this one (default: list all)")
    losses.add_argument("--json", action="store_true", help="for machines")
    inspect = _verb(verbs, "inspect", _inspect)
    inspect.add_argument("cache", help="folder of the cache")
    inspect.add_argument("--sample", metavar="KEY", help="show this sample's soft target at several temperatures")
    inspect.add_argument("--view", type=int, default=0, metavar="V", help="of the sample (default 0)")
    inspect.add_argument("--json", action="store_true", help="for machines")
    views = _verb(verbs, "views", _views)
    views.add_argument("cache", help="folder of the cache")
    views.add_argument("--sample", metavar="KEY", required=True, help="whose views")
    views.add_argument("--out", metavar="FILE", default="views.png", help="the picture (default: views.png)")
    views.add_argument("--data", metavar="DATA", help="where the sample is (default: as the dump was given it)")
    _allow_code(views)
    verify = _verb(verbs, "verify", _verify)
    verify.add_argument("cache", help="folder of the cache")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="names and sizes (the default)")
    depth.add_argument("--full", action="store_true", help="hashes, block checksums and HDF5 structure")
    verify.add_argument("--replay", type=int, default=0, metavar="N", help="also render N records and compare pixels")
    verify.add_argument("--data", metavar="DATA", help="for --replay (default: as the dump was given it)")
    _allow_code(verify)
    verify.add_argument("--json", action="store_true", help="for machines")
    repair = _verb(verbs, "repair", _repair)
    repair.add_argument("cache", help="folder of the cache")
    repair.add_argument(
        "--from", dest="source", metavar="DIR", help="take damaged files from another copy of the cache"
    )
    repair.add_argument("--data", metavar="DATA", help="the transfer set (default: as the dump was given it)")
    repair.add_argument(
        "--teacher", action="append", default=[], metavar="TEACHER", help="repeat (default: as the dump was given them)"
    )
    repair.add_argument(
        "--device", default="auto", metavar="DEVICE", help="as it was at the dump: bytes may depend on it"
    )
    _allow_code(repair)
    repair.add_argument("--workers", type=int, metavar="N", help="loader processes (default: 0 on a CPU, 4 with a GPU)")
    repair.add_argument("--json", action="store_true", help="for machines")
    subset = _verb(verbs, "subset", _subset)
    subset.add_argument("cache", help="folder of the cache")
    subset.add_argument("out", help="folder of the smaller cache")
    subset.add_argument(
        "--views", metavar="A-B", help="one range of views, both ends included, or one view (default: all)"
    )
    lists = {
        "--members": ("NAMES", "members to keep: a,b (default: all)"),
        "--keep-labels": ("LABELS", "only samples of these classes: names or indices, 7,8 or 0-4"),
        "--drop-labels": ("LABELS", "no samples of these classes"),
    }
    for flag, (metavar, text) in lists.items():
        subset.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    subset.add_argument(
        "--samples", metavar="FILE", help="only the samples whose keys (or ids) this file lists, one a line"
    )
    subset.add_argument("--id", metavar="ID", help="of the manifest to read (default: the newest)")
    subset.add_argument("--license", metavar="TEXT", help="of the smaller cache (default: the cache's)")
    subset.add_argument("--json", action="store_true", help="the result for machines")
    return parser


def _allow_code(parser: argparse.ArgumentParser) -> None:
    text = "run code that the cache names: transforms of its views, factories of its data and teachers"
    parser.add_argument("--allow-code", action="store_true", help=text)


def _verb(verbs: Any, name: str, handler: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=SUMMARIES[name],
        description=SUMMARIES[name],
        epilog=f"examples:{EXAMPLES[name]}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _config_verb(
    verbs: Any, name: str, kind: type[Any], handler: Callable[[Any, argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A verb whose flags are the fields of a config dataclass."""
    parser = _verb(verbs, name, partial(_with_config, kind, handler))
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag, meta, hint = flag_of(field.name), field.metadata, hints[field.name]
        text = meta["help"]
        if field.default not in (None, (), False) and not meta["required"]:
            text += f" (default: {field.default})"
        text = text.replace("%", "%%")
        if hint is bool:
            parser.add_argument(flag, dest=field.name, action="store_const", const="true", default=None, help=text)
        elif typing.get_origin(hint) is tuple:
            parser.add_argument(
                flag, dest=field.name, action="append", default=None, metavar=meta["metavar"], help=text
            )
        else:
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else meta["metavar"]
            parser.add_argument(flag, dest=field.name, default=None, metavar=metavar, help=text)
    parser.add_argument("--config", metavar="FILE", help="settings from a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; repeat")
    parser.add_argument(
        "--print-config", action="store_true", help="show every setting and where it came from, and stop"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="the result for machines")
    return parser


def _with_config(
    kind: type[Any], handler: Callable[[Any, argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
    """Find the config of a verb out of all sources, then run the verb, or only print it with --print-config."""
    names = {field.name for field in dataclasses.fields(kind)}
    flags = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    for name, value in flags.items():
        # a repeated list is one list; teachers, steps and losses hold commas of their own
        if isinstance(value, list) and name not in ("teacher", "policy", "augment", "loss", "stage"):
            flags[name] = ",".join(value)
    resolved = resolve(kind, file=arguments.config, sets=arguments.set, flags=flags)
    if not arguments.print_config:
        return handler(resolved.config, arguments)
    from softcache.report.tables import table

    rows = [[name, str(getattr(resolved.config, name)), origin] for name, origin in resolved.origins.items()]
    print(table(["setting", "value", "from"], rows))
    return 0


def _dump(config: DumpConfig, arguments: argparse.Namespace) -> int:
    from softcache.dump import flow as dump
    from softcache.report.tables import size

    if config.list_modules:
        from softcache.dump.list_modules import list_modules

        print(list_modules(config))
        return 0
    result = dump.run(config, quiet=arguments.quiet)
    manifest = result.manifest
    if arguments.json:
        print(json.dumps({"path": str(result.path), "id": manifest.id if manifest else None}))
    elif manifest is None:
        print(f"{result.path}: this part is done; the cache is committed when the other parts are")
    else:
        print(f"{result.path}: {len(manifest.files)} files, {size(manifest.nbytes)}, id {manifest.id}")
        data = shlex.quote(config.data)
        print(f"next: softcache train --cache {result.path} --data {data} --student ... --out runs/student")
    return 0


def _plan(config: PlanConfig, arguments: argparse.Namespace) -> int:
    from softcache.dump import forecast as plan

    forecast = plan.run(config)
    print(json.dumps(forecast.to_json()) if arguments.json else forecast.text())
    return 0


def _train(config: TrainConfig, arguments: argparse.Namespace) -> int:
    from softcache import train
    from softcache.evaluate.measure import summary
    from softcache.report.tables import table

    result = train.run(config, quiet=arguments.quiet)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first talks
        return 0
    if arguments.json:
        last = {"path": str(result.path), "parameters": result.parameters, **result.metrics[-1]}
        print(json.dumps(last))
        return 0
    shown = [row for row in result.metrics if row["epoch"] % max(1, len(result.metrics) // 10) == 0]
    if result.metrics[-1] not in shown:
        shown.append(result.metrics[-1])
    names = dict.fromkeys(name for row in result.metrics for name in row)  # stages have terms of their own
    columns = [name for name in names if name not in ("view", "seconds")] + ["seconds"]
    print(table(columns, [[row.get(name) for name in columns] for row in shown]))
    if config.eval_data is not None and result.evaluation is not None:
        print("\n" + summary(config.eval_data, result.evaluation))
    print(f"\n{result.path}: {result.parameters:,} parameters; next: softcache eval {result.path} --data ...")
    return 0


def _eval(config: EvalConfig, arguments: argparse.Namespace) -> int:
    from softcache.evaluate import measure

    result = measure.run(arguments.model, config, quiet=arguments.quiet)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(measure.summary(f"{arguments.model} on {config.data}", result))
        if config.per_class:
            print("\n" + measure.class_table(result))
    return 0


def _export(config: ExportConfig, arguments: argparse.Namespace) -> int:
    from softcache.students import export

    result = export.run(arguments.model, config, quiet=arguments.quiet or arguments.json)
    print(json.dumps(result.to_json()) if arguments.json else result.text())
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from softcache.reproduce import flow as reproduce
    from softcache.spec import convert

    if arguments.recipe.upper() == "LIST":
        print(reproduce.listing())
        return 0
    done = reproduce.run(
        arguments.recipe,
        budget=arguments.budget,
        data_root=arguments.data_root,
        data=arguments.data,
        models=arguments.use,
        seeds=convert(arguments.seeds, tuple[int, ...], "--seeds") if arguments.seeds else (),
        only=arguments.only,
        device=arguments.device,
        out=Path(arguments.out),
        download=arguments.download,
        quiet=arguments.quiet,
    )
    print(json.dumps(done.to_json()) if arguments.json else done.text())
    return 0


def _losses(arguments: argparse.Namespace) -> int:
    from softcache.commands import losses as catalogue

    if arguments.json:
        print(json.dumps(catalogue.to_json(arguments.name)))
    else:
        print(catalogue.explanation(arguments.name) if arguments.name else catalogue.listing())
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from softcache.check import inspect

    path = Path(arguments.cache)
    if arguments.sample is not None:
        print(printable(inspect.sample_report(path, arguments.sample, view=arguments.view)))
    elif arguments.json:
        print(json.dumps(inspect.describe(path), indent=1))
    else:
        print(printable(inspect.report(path)))
    return 0


def _views(arguments: argparse.Namespace) -> int:
    from softcache.check import view_picture

    path, out = Path(arguments.cache), Path(arguments.out)
    print(view_picture.draw_views(path, arguments.sample, out, data=arguments.data, allow_code=arguments.allow_code))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from softcache.check import verify

    path = Path(arguments.cache)
    verdict = verify.run(
        path,
        full=arguments.full,
        quiet=arguments.json,
        replay=arguments.replay,
        data=arguments.data,
        allow_code=arguments.allow_code,
    )
    print(json.dumps(dataclasses.asdict(verdict)) if arguments.json else printable(verdict.text()))
    return verdict.exit_code


def _repair(arguments: argparse.Namespace) -> int:
    from softcache.check import repair

    means = repair.Means(
        source=Path(arguments.source) if arguments.source else None,
        data=arguments.data,
        teachers=arguments.teacher,
        device=arguments.device,
        workers=arguments.workers,
        allow_code=arguments.allow_code,
    )
    result = repair.run(Path(arguments.cache), means, quiet=arguments.json)
    print(json.dumps(dataclasses.asdict(result)) if arguments.json else printable(result.text()))
    return result.exit_code


def _subset(arguments: argparse.Namespace) -> int:
    from softcache.report.tables import size
    from softcache.share import subset
    from softcache.spec import convert

    def listed(flag: str, given: list[str]) -> tuple[str, ...]:
        names: tuple[str, ...] = convert(",".join(given), tuple[str, ...], flag)
        if given and not names:
            raise ConfigError(f"{flag} names nothing", tip="leave it out to keep all")
        return names

    choice = subset.Choice(
        views=arguments.views,
        members=listed("--members", arguments.members),
        keep_labels=listed("--keep-labels", arguments.keep_labels),
        drop_labels=listed("--drop-labels", arguments.drop_labels),
        samples=Path(arguments.samples) if arguments.samples else None,
    )
    path, out = Path(arguments.cache), Path(arguments.out)
    manifest = subset.run(path, out, choice, id=arguments.id, license=arguments.license, quiet=arguments.json)
    plan = manifest.plan
    assert plan.parent is not None
    if arguments.json:
        found = {"path": str(out), "id": manifest.id, "parent": plan.parent.id, "bytes": manifest.nbytes}
        found |= {"samples": plan.samples.count, "views": plan.views.count, "members": [m.name for m in plan.members]}
        print(json.dumps(found))
        return 0
    members = ", ".join(member.name for member in plan.members)
    views = f"{plan.views.count} view{'s' * (plan.views.count != 1)}"
    print(f"{out}: {plan.samples.count:,} samples x {views} of {members}; {size(manifest.nbytes)}")
    print(f"id {manifest.id}, out of {plan.parent.id}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from softcache import demo
    from softcache.spec import convert

    seeds = convert(arguments.seeds, tuple[int, ...], "--seeds")
    print(demo.run(Path(arguments.out), seeds=seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
