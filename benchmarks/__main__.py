"""What partial training saves on this device.

python -m benchmarks run --suite quick            # measure, then report; run it again to go on
python -m benchmarks run --suite gpu --time-limit 540 --resume earlier.jsonl --out results/gpu.jsonl
python -m benchmarks merge a.jsonl b.jsonl --out all.jsonl
python -m benchmarks report all.jsonl             # tables and pictures of what was measured
python -m benchmarks compare before.jsonl after.jsonl
python -m benchmarks run --model mypackage:make_model --policy 'Freeze("backbone")'
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import cases, compare, devices, results, runner
from benchmarks.cases import Case
from benchmarks.results import Row

HERE = pathlib.Path("results")
OWN = ("model", "data", "loss", "optimizer", "policy")  # what is asked of a user's own model
FUNCTION = "PACKAGE:FUNCTION"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=as_written)
    verbs = parser.add_subparsers(required=True)
    asked = verbs.add_parser("run", help="measure what was not measured before, and report")
    asked.set_defaults(do=run)
    add = asked.add_argument
    add("--suite", choices=(*cases.SUITES, *cases.FEATURES), help="what to measure; by default quick")
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=f"of {', '.join(cases.ARMS)}, each with +CHANGE or without; by default all",
    )
    add("--workloads", nargs="+", metavar="NAME", help=f"of {', '.join(cases.SELECTIONS)}; by default all")
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start what is expected to end by then, and stop what runs on",
    )
    add("--scale", type=float, default=1.0, help="multiply sizes by this, from 0 to 1, for a trial")
    add("--processes", type=int, help="measure only so many processes of each case")
    add("--resume", type=pathlib.Path, nargs="+", default=[], help="more results whose cases are done")
    add("--retry", action="store_true", help="measure again what failed")
    add("--out", type=pathlib.Path, help=f"where lines are added; by default {HERE}/SUITE.jsonl")
    add("--model", metavar=FUNCTION, help="your own model instead of a suite: what returns it")
    add("--data", default="", metavar=FUNCTION, help="its data: `make(count)` gives inputs, targets")
    add("--loss", default="", help=f"its loss: a class of `keras.losses`, or {FUNCTION} that returns one")
    add("--optimizer", default="", help=f"its optimizer: a name, or {FUNCTION} that returns one")
    add(
        "--policy",
        default="TrainAll()",
        help=f"what trains of it: an expression in tapeloop's names, or {FUNCTION} that returns a policy",
    )
    add("--batch", type=int, default=16, help="examples in a batch of it")
    add("--steps", type=int, default=20, help="steps in a long round of it")
    asked = verbs.add_parser("merge", help="put results together, each case once")
    asked.set_defaults(do=merge)
    asked.add_argument("results", type=pathlib.Path, nargs="+")
    asked.add_argument("--out", type=pathlib.Path, required=True, help="a file that is not there yet")
    asked = verbs.add_parser("report", help="make report.md, report.html and pictures of results")
    asked.set_defaults(do=show)
    asked.add_argument("results", type=pathlib.Path, nargs="+")
    asked.add_argument("--out", type=pathlib.Path, help="the folder; by default one named as the results, beside them")
    asked = verbs.add_parser("compare", help="say what got worse beyond the noise, and exit with 1 if anything did")
    asked.set_defaults(do=judge)
    asked.add_argument("before", type=pathlib.Path)
    asked.add_argument("after", type=pathlib.Path)
    asked.add_argument("--no-remeasure", action="store_true", help="do not measure again what seems slower")
    return parser.parse_args(arguments)


def selected(options: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for.

    Raises:
        ValueError: There is no such workload or arm, options do not go together, or nothing is left.
    """
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"`--processes` must be 1 or more. Received: {options.processes}.")
    if options.model:
        if options.suite or options.workloads or options.scale != 1:
            raise ValueError("`--model` is instead of a suite: leave out `--suite`, `--workloads` and `--scale`.")
        batch, steps = options.batch, options.steps
        if batch < 1 or steps < 2:
            raise ValueError(f"`--batch` must be 1 or more and `--steps` 2 or more. Received: {batch}, {steps}.")
        own = tuple((name, getattr(options, name)) for name in OWN)
        name = options.model.replace(":", ".")
        check = Case(name, options.policy, "tapeloop", batch, steps=steps, rounds=3, kind="equivalence", own=own)
        found = [check] + [
            dataclasses.replace(check, arm=arm, kind=kind, process=process)
            for kind, processes in (("memory", 1), ("step", 3)) for process in range(processes)
            for arm in cases.OWN_ARMS
        ]  # fmt: skip
    else:
        if not 0 < options.scale <= 1:
            raise ValueError(f"`--scale` must be above 0, and 1 at most. Received: {options.scale}.")
        found = cases.suite(options.suite or "quick", options.scale)
    found = cases.chosen(found, options.arms, options.workloads)
    missing = {arm for arm, (_, needed) in cases.PEERS.items() if not all(map(importlib.util.find_spec, needed))}
    found = [case for case in found if not options.processes or case.process < options.processes]
    for arm in sorted(missing & {case.base for case in found}):
        print(f"The arm `{arm}` is skipped: it needs {' and '.join(cases.PEERS[arm][1])}, which is not all installed.")
    room = 0.9 * devices.memory_mb()
    return [case for case in found if case.base not in missing and not 0 < room < case.cap_mb]


def run(options: argparse.Namespace) -> int:
    """Measure what was asked, then report, and return 1 where an arm failed or computes something else.

    Raises:
        ValueError: What is asked for is not there, a GPU suite has no GPU, or nothing could be measured.
    """
    if (options.suite or "").startswith("gpu") and options.scale == 1 and not devices.gpus():
        raise ValueError(
            f"The suite `{options.suite}` needs a GPU, and `nvidia-smi` shows none. `--scale 0.1` tries it out on a "
            "CPU; the suite `cpu` needs none."
        )
    importlib.import_module("benchmarks.report")  # which needs pandas and Matplotlib, better missed now than in the end
    found = selected(options)
    if not found:
        raise ValueError("Nothing is left to run.")
    out = options.out or HERE / f"{'own' if options.model else options.suite or 'quick'}.jsonl"
    if out.suffix != ".jsonl":
        raise ValueError(f"`--out` must be a file that ends in .jsonl. Received: {str(out)!r}.")
    before = results.load(*dict.fromkeys([*options.resume, *[out] * out.exists()]))
    before = [row for row in before if not options.retry or row["status"] != "error"]
    made, left = runner.run(found, out, before=before, limit_s=options.time_limit)
    wanted = {results.key_of(case) for case in found}
    rows = [row for row in [*before, *made] if row["key"] in wanted]
    bad = [row for row in rows if row["status"] == "error" or row.get("invalid")]
    for row in bad:
        print(f"FAILED: {runner.said(row).strip()}", file=sys.stderr)
    if left:
        again = "run the same command again to go on" if made else "none was thought to fit the time limit: give more"
        print(f"{len(left)} of {len(found)} cases are left: {again}.")
    if any(row["status"] == "ok" for row in rows):
        write_report(results.ended(rows), out.with_suffix(""), out.name)
    else:
        print("Nothing could be measured.", file=sys.stderr)
        return 1
    return int(bool(bad))


def write_report(rows: Sequence[Row], folder: pathlib.Path, source: str) -> None:
    """Write the report and its pictures, and print what stands at its top."""
    print(importlib.import_module("benchmarks.report").write(rows, folder, source))
    print(f"\nThe whole report, with pictures: {folder / 'report.md'} and {folder / 'report.html'}")


def merge(options: argparse.Namespace) -> int:
    """Put results together.

    Raises:
        ValueError: The file to write is there.
    """
    if options.out.exists():
        raise ValueError(f"`{options.out}` is there already, and results are never written over. Give another `--out`.")
    rows = results.ended(results.load(*options.results))
    results.append(options.out, rows)
    print(f"{len(rows)} results of {len(options.results)} files are in {options.out}.")
    return 0


def show(options: argparse.Namespace) -> int:
    """Report results that are there."""
    first = options.results[0]
    write_report(results.load(*options.results), options.out or first.with_suffix(""), first.name)
    return 0


def judge(options: argparse.Namespace) -> int:
    """Compare results, measure again what seems slower, and return 1 if anything got worse."""
    before, after = (results.newest(results.ended(results.load(path))) for path in (options.before, options.after))
    verdict = compare.compare(before, after)
    print("\n".join(verdict.said) or "Nothing else changed beyond the noise.")
    worse = verdict.worse
    if verdict.slower:
        print("\n".join(f"SUSPECTED: {text}" for text in verdict.slower.values()))
        here = (results.code(), results.environment())
        if options.no_remeasure or not all((row["code"], row["environment"]) == here for row in after):
            print("Whether that is so is known when it is measured again, with this code on this machine.")
        else:
            print("They are measured again, in other processes.")
            again = compare.measured_again(verdict, after, lambda some: runner.run(some, options.after)[0])
            worse = compare.confirmed(verdict, compare.compare(before, again))
    print("\n".join(f"WORSE: {line}" for line in worse) or "Nothing got worse.")
    return int(bool(worse))


def main(arguments: list[str]) -> int:
    """Do what the command line says, and return the exit status."""
    options = parse(arguments)
    try:
        return options.do(options)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
