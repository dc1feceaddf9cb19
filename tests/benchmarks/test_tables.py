"""What the benchmark suite measures, and the figures that its tables show."""

import dataclasses
import json
import pathlib
import re

import pytest

from benchmarks import cases, runner, tables
from benchmarks.cases import ARMS, Group
from benchmarks.measure import summary
from benchmarks.results import Results, machine

ROOT = pathlib.Path(__file__).parents[2]
GROUP = Group("mlp", "head", 64, steps=10, rounds=7)


def test_quartiles_worked_out_by_hand():
    found = summary([0.010, 0.020, 0.030, 0.040, 0.050], steps=10, batch=4, first=1.0)
    assert found["step_ms"] == pytest.approx(3.0)
    assert found["step_ms_quartiles"] == pytest.approx([2.0, 4.0])
    assert found["examples_per_s"] == pytest.approx(4 / 0.003)
    assert found["trace_compile_s"] == pytest.approx(0.997)


def test_where_all_trains_full_backprop_must_agree_too():
    rows = [{"arm": arm, "loss": loss} for arm, loss in (("full", 1.0), ("selective", 1.0), ("tapeloop", 1.1))]
    runner.judge(dataclasses.replace(GROUP, selection="all"), rows)
    assert ["invalid" in row for row in rows] == [False, False, True]
    rows = [{"arm": arm, "loss": loss} for arm, loss in (("full", 2.0), ("selective", 1.0), ("tapeloop", float("nan")))]
    runner.judge(dataclasses.replace(GROUP, selection="all"), rows)
    assert ["invalid" in row for row in rows] == [True, False, True]


@pytest.mark.parametrize("name", cases.SIZES)
def test_suites_name_what_there_is(name):
    groups = cases.suite(name)
    assert len({group.key for group, _ in groups}) == len(groups)
    for group, arms in groups:
        assert group.selection in cases.SELECTIONS[group.workload]
        assert set(arms or ()) <= set(ARMS)
        assert group.dtype in cases.DTYPES
        assert group.steps >= 2


def test_the_gpu_suite_has_every_selection_and_xla_on_and_off():
    groups = [group for group, _ in cases.suite("gpu")]
    for workload, selections in cases.SELECTIONS.items():
        assert {group.selection for group in groups if group.workload == workload} == set(selections)
    of_suite = [group for group, arms in cases.suite("gpu") if arms is None]
    for dtype in cases.DTYPES:
        plain = {group.key for group in of_suite if group.dtype == dtype and not group.xla}
        compiled = {
            dataclasses.replace(group, xla=False).key for group in of_suite if group.dtype == dtype and group.xla
        }
        assert plain == compiled != set()


def test_the_floors_table():
    rows = [
        {**dataclasses.asdict(GROUP), "arm": arm, "step_ms": step, "rounds_ms": [step, 2 * step, step], "peak": peak}
        for arm, step, peak in (("forward", 1.0, 100), ("full", 4.0, 400), ("selective", 1.1, 100))
    ]
    rows.append({**rows[0], "arm": "tapeloop", "step_ms": 1.2, "rounds_ms": [1.2, 2.4, 9.9], "peak": 110})
    rows.append({**rows[0], "arm": "tapeloop+cache", "step_ms": 0.3, "rounds_ms": [0.3, 0.3, 0.3], "peak": 110})
    header = (
        "what trains | floor ms | tapeloop ms | / floor | / by hand | / full | peak / floor | peak / full | / Keras"
        " | cached"
    )
    assert tables.floors(tables.by_group(rows)) == [
        f"| {header} |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| mlp head, batch 64 | 1 | 1.2 | 1.20 | 1.09 | 0.30 | 1.10 | 0.28 | - | 0.12 |",
    ]


def test_slopes_worked_out_by_hand():
    rows = []
    for batch, step in ((8, 10.0), (16, 14.0), (32, 22.0)):  # 6 ms and half a millisecond for each example
        group = dataclasses.replace(GROUP, workload="vit", batch=batch)
        rows.append({**dataclasses.asdict(group), "arm": "tapeloop", "step_ms": step, "peak": batch * 2**20})
    for width, step in ((1, 1.0), (2, 3.0), (4, 9.0)):  # three times as long for twice the width
        group = dataclasses.replace(GROUP, width=float(width))
        rows.append({**dataclasses.asdict(group), "arm": "tapeloop", "step_ms": step, "peak": None})
    assert tables.scaling(tables.by_group(rows)) == [
        "| what | arm | batch size | ms for each example more | MiB for each example more |",
        "| --- | --: | --: | --: | --: |",
        "| vit float32 head | tapeloop | 8, 16, 32 | 0.5 | 1 |",
        "",
        "| what | arm | width | ms for each doubling | MiB for each doubling |",
        "| --- | --: | --: | --: | --: |",
        "| mlp float32 head b64 | tapeloop | 1, 2, 4 | x 3.00 | - |",
    ]


def test_the_machine_is_described():
    assert machine()["cores"] >= 1
    assert machine()["processor"]


@pytest.mark.parametrize("name", ["quick", "cpu"])
def test_the_documentation_shows_the_committed_figures(name):
    results = Results.load(ROOT / "benchmarks" / "results" / f"{name}.json")
    assert results.complete
    folder, document = ROOT / "benchmarks" / "results" / name, (ROOT / "docs" / "benchmarks.md").read_text()
    assert "\n".join(tables.floors(tables.by_group(results.rows))) in document
    assert f"`{results.command}`" in document
    pictures = re.findall(rf"results/{name}/(.*?\.png)\)", document)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    shown = ["step-time.png", "peak-memory.png", "depth.png", "batch.png", "width.png"]
    assert (folder / "report.md").read_text() == tables.report(results, shown)


def test_the_guide_shows_the_figures_of_steps_on_one_batch():
    cases = json.loads((ROOT / "benchmarks" / "results" / "on_batch.json").read_text())["cases"]
    guide = (ROOT / "docs" / "guides" / "reinforcement-learning.md").read_text()
    mlp, mobilenet = (f"{case['ratio']:.2f}" for case in cases.values())
    assert f"takes {mlp} of Keras' `train_on_batch` on the MLP and {mobilenet} on the" in guide
