"""What partial training saves on this device.

python -m benchmarks run --suite quick            # measure, then report
python -m benchmarks report results/quick.json    # tables and pictures of what was measured
python -m benchmarks compare before.json after.json
python -m benchmarks run --model mypackage:make_model --policy 'Freeze("backbone")'
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import shlex
import sys

from benchmarks import cases, runner, tables
from benchmarks.compare import compare
from benchmarks.results import Results

HERE = pathlib.Path("results")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure; a run that was cut off goes on where it was")
    run.add_argument("--suite", choices=tuple(cases.SIZES), default="quick")
    run.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(cases.ARMS)}; by default all")
    run.add_argument("--workloads", nargs="+", metavar="NAME", help=f"of {', '.join(cases.SELECTIONS)}; by default all")
    run.add_argument("--out", type=pathlib.Path, help=f"where results go; by default {HERE}/SUITE.json")
    run.add_argument("--model", default="", metavar="PACKAGE:FUNCTION", help="your own model instead of a suite")
    run.add_argument("--policy", default="TrainAll()", help="what trains of it, in tapeloop's names")
    run.add_argument("--batch", type=int, default=16, help="examples in a batch of it")
    run.add_argument("--steps", type=int, default=20, help="steps in a round of it")
    shown = verbs.add_parser("report", help="make report.md and pictures of results")
    shown.add_argument("results", type=pathlib.Path)
    shown.add_argument("--out", type=pathlib.Path, help="the folder; by default one named as the results, beside them")
    compared = verbs.add_parser("compare", help="say what got worse beyond the noise, and exit with 1 if anything did")
    compared.add_argument("before", type=pathlib.Path)
    compared.add_argument("after", type=pathlib.Path)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: str) -> None:
    """Measure what was asked, then report.

    Raises:
        ValueError: There is no such workload or arm, no GPU for a suite that needs one, nothing could be measured, or
            the results are another's.
    """
    out = options.out or HERE / f"{'own' if options.model else options.suite}.json"
    if out.suffix != ".json":
        raise ValueError(f"`--out` must be a file that ends in .json. Received: {str(out)!r}.")
    if options.batch < 1 or options.steps < 2:
        raise ValueError(
            f"`--batch` must be 1 or more and `--steps` 2 or more. Received: {options.batch}, {options.steps}."
        )
    importlib.import_module("benchmarks.plots")  # which needs Matplotlib, better missed now than in the end
    if options.model:
        name = options.model.replace(":", ".")
        group = cases.Group(name, options.policy, options.batch, steps=options.steps, model=options.model)
        chosen = cases.cases([(group, cases.OWN_MODEL_ARMS)], options.arms, None)
    else:
        chosen = cases.cases(cases.suite(options.suite), options.arms, options.workloads)
        if options.suite == "gpu" and not runner.has_gpu():
            raise ValueError(
                "The suite `gpu` needs a GPU that TensorFlow sees, and `tf.config.list_physical_devices('GPU')` is "
                "empty. `TF_CPP_MIN_LOG_LEVEL=0` says why; the suite `cpu` needs none."
            )
    results = Results.resume(out, command)
    results.write()
    runner.run(chosen, results, options.policy)
    results.complete = True
    results.write()
    write_report(results, out.with_suffix(""))
    if not any("step_ms" in row for row in results.rows):
        raise ValueError(f"Nothing could be measured: {results.rows[0]['error']}")


def write_report(results: Results, folder: pathlib.Path) -> None:
    """Write the report and its pictures, and print the table of floors."""
    plots = importlib.import_module("benchmarks.plots")
    text = tables.report(results, plots.draw(results, folder))
    (folder / "report.md").write_text(text)
    print("\n".join(tables.floors(tables.by_group(results.rows))))
    print(f"\nThe whole report, with pictures: {folder / 'report.md'}")


def main(arguments: list[str]) -> int:
    """Do what the command line says, and return the exit status."""
    options = parse(arguments)
    try:
        if options.verb == "run":
            run(options, shlex.join(["python", "-m", "benchmarks", *arguments]))
        elif options.verb == "report":
            write_report(Results.load(options.results), options.out or options.results.with_suffix(""))
        else:
            regressions, said = compare(Results.load(options.before), Results.load(options.after))
            print(
                "\n".join([*said, *(f"WORSE: {line}" for line in regressions)] or ["Nothing changed beyond the noise."])
            )
            return int(bool(regressions))
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
