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
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import cases, compare, devices, results, runner
from benchmarks.cases import Case
from benchmarks.results import Row

HERE = pathlib.Path("results")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure what was not measured before, and report")
    run.add_argument("--suite", choices=(*cases.SUITES, *cases.FEATURES), default="quick")
    run.add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"of {', '.join(cases.ARMS)}, with +CHANGE; by default all"
    )
    run.add_argument("--workloads", nargs="+", metavar="NAME", help=f"of {', '.join(cases.SELECTIONS)}; by default all")
    run.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="begin nothing that will not fit, and end by then"
    )
    run.add_argument("--scale", type=float, default=1.0, help="shrink sizes to this part, to try things out")
    run.add_argument("--processes", type=int, help="measure the first so many processes of each case alone")
    run.add_argument("--resume", type=pathlib.Path, nargs="+", default=[], help="results whose cases are done")
    run.add_argument("--out", type=pathlib.Path, help=f"where lines are added; by default {HERE}/SUITE.jsonl")
    run.add_argument("--model", metavar="PACKAGE:FUNCTION", help="your own model instead of a suite")
    run.add_argument(
        "--data", default="", metavar="PACKAGE:FUNCTION", help="its data: `make(count)` gives inputs, targets"
    )
    run.add_argument("--loss", default="", help="its loss: a class of `keras.losses`, or PACKAGE:FUNCTION")
    run.add_argument("--optimizer", default="", help="its optimizer: a name, or PACKAGE:FUNCTION")
    run.add_argument("--policy", default="TrainAll()", help="what trains of it, in tapeloop's names")
    run.add_argument("--batch", type=int, default=16, help="examples in a batch of it")
    run.add_argument("--steps", type=int, default=20, help="steps in a long round of it")
    merged = verbs.add_parser("merge", help="put results together, each case once")
    merged.add_argument("results", type=pathlib.Path, nargs="+")
    merged.add_argument("--out", type=pathlib.Path, required=True, help="a file that is not there yet")
    shown = verbs.add_parser("report", help="make report.md, report.html and pictures of results")
    shown.add_argument("results", type=pathlib.Path, nargs="+")
    shown.add_argument("--out", type=pathlib.Path, help="the folder; by default one named as the results, beside them")
    compared = verbs.add_parser("compare", help="say what got worse beyond the noise, and exit with 1 if anything did")
    compared.add_argument("before", type=pathlib.Path)
    compared.add_argument("after", type=pathlib.Path)
    compared.add_argument("--no-remeasure", action="store_true", help="do not measure again what seems slower")
    return parser.parse_args(arguments)


def selected(options: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for.

    Raises:
        ValueError: There is no such workload or arm, or nothing is left.
    """
    if options.model:
        if options.batch < 1 or options.steps < 2:
            asked = f"{options.batch}, {options.steps}"
            raise ValueError(f"`--batch` must be 1 or more and `--steps` 2 or more. Received: {asked}.")
        names = ("model", "data", "loss", "optimizer", "policy")
        own = tuple((name, getattr(options, name)) for name in names)
        fields = {"batch": options.batch, "steps": options.steps, "own": own, "rounds": 3}
        found = [
            Case(options.model.replace(":", "."), options.policy, arm, kind=kind, process=process, **fields)
            for kind, processes in (("memory", 1), ("step", 3))
            for process in range(processes) for arm in cases.OWN_ARMS
        ]  # fmt: skip
        check = Case(options.model.replace(":", "."), options.policy, "tapeloop", kind="equivalence", **fields)
        found = cases.chosen([check, *found], options.arms, None)
    else:
        if not 0 < options.scale <= 1:
            raise ValueError(f"`--scale` must be above 0, and 1 at most. Received: {options.scale}.")
        found = cases.chosen(cases.suite(options.suite, options.scale), options.arms, options.workloads)
    if options.processes:
        found = [case for case in found if case.process < options.processes]
    missing = {arm for arm in cases.PEERS if not all(map(importlib.util.find_spec, {arm, "torch"}))}
    for arm in sorted(missing & {case.base for case in found}):
        print(f"The arm `{arm}` is skipped: it needs the package `{arm}`, which is not installed.")
    return [case for case in found if case.base not in missing]


def run(options: argparse.Namespace) -> int:
    """Measure what was asked, then report, and return 1 where an arm failed or computes something else.

    Raises:
        ValueError: What is asked for is not there, a GPU suite has no GPU, or nothing could be measured.
    """
    if options.suite.startswith("gpu") and not options.model and options.scale == 1 and not devices.gpus():
        raise ValueError(
            f"The suite `{options.suite}` needs a GPU, and `nvidia-smi` shows none. `--scale 0.1` tries it out on a "
            "CPU; the suite `cpu` needs none."
        )
    importlib.import_module("benchmarks.report")  # which needs pandas and Matplotlib, better missed now than in the end
    found = selected(options)
    out = options.out or HERE / f"{'own' if options.model else options.suite}.jsonl"
    if out.suffix != ".jsonl":
        raise ValueError(f"`--out` must be a file that ends in .jsonl. Received: {str(out)!r}.")
    before = results.load(*dict.fromkeys([*options.resume, *[out] * out.exists()]))
    made, left = runner.run(found, out, before=before, limit_s=options.time_limit)
    wanted = {results.key_of(case) for case in found}
    rows = [row for row in [*before, *made] if row["key"] in wanted]
    status = 0
    for row in rows:
        if row["status"] == "error" or row.get("invalid"):
            print(f"FAILED: {runner.said(row).strip()}", file=sys.stderr)
            status = 1
    if left:
        again = "run the same command again to go on" if made else "none was thought to fit the time limit: give more"
        print(f"{len(left)} of {len(found)} cases are left: {again}.")
    if any("step_ms" in row for row in rows):
        write_report(results.ended(rows), out.with_suffix(""), out.name)
    elif status:
        print("Nothing could be measured.", file=sys.stderr)
    return status


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


def judge(options: argparse.Namespace) -> int:
    """Compare results, measure again what seems slower, and return 1 if anything got worse."""
    before, after = (results.ended(results.load(path)) for path in (options.before, options.after))
    verdict = compare.compare(before, after)
    print("\n".join(verdict.said) or "Nothing else changed beyond the noise.")
    worse = verdict.worse
    if verdict.slower:
        print("\n".join(f"SUSPECTED: {text}" for text in verdict.slower.values()))
        here = {(row["code"], str(row["environment"])) for row in after} == {
            (results.code(), str(results.environment()))
        }
        if options.no_remeasure or not here:
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
        if options.verb == "run":
            return run(options)
        if options.verb == "merge":
            return merge(options)
        if options.verb == "compare":
            return judge(options)
        rows = results.load(*options.results)
        write_report(rows, options.out or options.results[0].with_suffix(""), options.results[0].name)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
