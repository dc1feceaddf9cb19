"""What is made of rows: figures, verdicts, tables and reports."""

import re

import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import compare, measure, plots, report, results
from benchmarks.cases import Case
from tests.support.measured import figures

ARMS = ("forward", "full", "hand", "tapeloop")
MIB = 2**20


def rows_of(first=0, processes=3, kinds=("step",), arms=ARMS, noise=0.01, **planted):
    """Rows of all arms of a group; what is planted of an arm replaces its figures or slows it."""
    found = []
    for kind in kinds:
        for process in range(first, first + (processes if kind == "step" else 1)):
            for arm in arms:
                case = Case("mlp", "head", arm, 64, kind=kind, process=process)
                found.append(
                    results.row_of(case, "ok", 1.0, **{**figures(arm, process, noise=noise), **planted.get(arm, {})})
                )
                if "slower" in planted.get(arm, {}):
                    found[-1] |= figures(arm, process, planted[arm]["slower"], noise=noise)
    return found


def test_a_step_is_what_a_longer_round_takes_more_and_the_start_of_a_fit_is_none_of_it():
    # 100 ms to begin and end a fit, 4 ms a step, 5 and 25 steps.
    found = measure.summary([0.12, 0.12, 0.14], [0.20, 0.20, 0.22], steps=25, batch=8, first=1.0)
    assert found["step_ms"] == pytest.approx(4.0)
    assert found["fixed_ms"] == pytest.approx(100.0)
    assert found["step_ms_interval"] == pytest.approx([4.0, 4.0])
    assert found["examples_per_s"] == pytest.approx(2000)
    assert found["compile_s"] == pytest.approx(0.996)
    assert found["rounds_ms"] == pytest.approx([4.0, 4.0, 4.0])


def test_processes_are_the_unit_of_an_interval():
    generator = np.random.default_rng(0)
    alike = [[1.0, 1.1, 0.9]] * 3
    low, high = measure.interval(alike, generator)
    assert 0.9 <= low <= 1.0 <= high <= 1.1
    low, high = measure.interval([[1.0] * 50, [2.0] * 50, [3.0] * 50], generator)
    assert (low, high) == (1.0, 3.0)  # many rounds in three processes that differ tell no more than three figures


def test_the_same_code_gives_no_alarm_twice_and_a_slower_step_does():
    alarms = {1.0: 0, 1.2: 0}
    for number in range(20):
        before = rows_of(first=20 * number, noise=0.03)
        for slower in alarms:
            first, again = (
                compare.compare(before, rows_of(first=20 * number + later, noise=0.03, tapeloop={"slower": slower}))
                for later in (5, 10)
            )
            alarms[slower] += len(compare.confirmed(first, again))
    assert alarms[1.0] == 0  # of 20 times 4 arms
    assert alarms[1.2] >= 19


def test_a_slower_machine_is_no_slower_code():
    before = rows_of(processes=4)
    after = [row | figures(row["case"]["arm"], row["case"]["process"], 1.5) for row in rows_of(processes=4)]
    verdict = compare.compare(before, after)
    assert (verdict.worse, verdict.slower) == ([], {})


def test_a_slower_step_is_suspected_and_worse_when_it_is_slower_again():
    before = rows_of()
    verdict = compare.compare(before, rows_of(tapeloop={"slower": 1.2}))
    ((case, text),) = verdict.slower.items()
    assert case.arm == "tapeloop"
    assert re.match(r"mlp head, batch 64, tapeloop: a step \d\.\d+ to 2\.\d+ of `forward` \(\+\d\d\.\d%, ", text)
    assert verdict.worse == []
    asked = []

    def again(slower):
        def run(some):
            asked.extend(some)
            return [row for row in rows_of(first=3, tapeloop={"slower": slower}) if Case.of(row) in some]

        return compare.measured_again(verdict, before, run)

    assert compare.confirmed(verdict, compare.compare(before, again(1.0))) == []
    assert {case.process for case in asked} == {3, 4, 5}
    assert {case.arm for case in asked} == {"forward", "hand", "full", "tapeloop"}
    assert len(compare.confirmed(verdict, compare.compare(before, again(1.2)))) == 1


def test_too_few_processes_say_nothing():
    verdict = compare.compare(rows_of(processes=2), rows_of(processes=2, tapeloop={"slower": 1.5}))
    assert verdict.slower == {}
    assert [line.split("(")[0] for line in verdict.said] == [
        "mlp head, batch 64, tapeloop: too few processes to tell a step's time "
    ]


def test_nodes_and_bytes_of_variables_must_be_the_same_and_other_bytes_nearly():
    before = rows_of(kinds=("memory",))
    planted = {"nodes": 117, "optimizer_bytes": 7, "persistent": 2**19 + 30_000, "growth": 5000}
    verdict = compare.compare(before, rows_of(kinds=("memory",), tapeloop=planted))
    said = {line.removeprefix("mlp head, batch 64, tapeloop: ") for line in verdict.worse}
    assert said == {
        "100 to 117 nodes in the step's graph",
        "persistent 524,288 to 554,288 bytes",
        "growth 0 to 5,000 bytes a step",
    }
    assert verdict.said == ["mlp head, batch 64, tapeloop: 8 to 7 bytes of optimizer"]


def test_a_failure_and_an_arm_that_computes_something_else_are_worse():
    before, after = rows_of(), rows_of()
    after[-1] |= {"status": "error", "error": "out of memory"}
    check = Case("mlp", "head", "tapeloop", 4, kind="equivalence")
    before.append(results.row_of(check, "ok", 1.0, invalid={}))
    after.append(results.row_of(check, "ok", 1.0, invalid={"keras": "its gradients differ"}))
    assert compare.compare(before, after).worse == [
        "mlp head, batch 64, tapeloop: error: out of memory",
        "mlp head, batch 4, tapeloop, equivalence: keras: its gradients differ",
    ]


def test_a_failure_of_more_processes_than_before_is_worse_and_one_when_it_is_measured_again():
    def failing(count):
        rows = rows_of(arms=("tapeloop",))
        return [row | {"status": "error", "error": "out of memory"} for row in rows[:count]] + rows[count:]

    assert compare.compare(failing(1), failing(3)).worse == ["mlp head, batch 64, tapeloop: error: out of memory"]
    verdict = compare.compare(failing(3), failing(1))
    assert (verdict.worse, verdict.said) == ([], ["mlp head, batch 64, tapeloop: fails less often: out of memory"])
    assert compare.confirmed(compare.Verdict([], {}, []), compare.Verdict(["it fails"], {}, [])) == ["it fails"]


def test_on_a_gpu_the_peak_that_is_read_beside_the_times_counts():
    def on(device, **planted):
        return [row | {"environment": {**row["environment"], "device": device}} for row in rows_of(**planted)]

    larger = {"tapeloop": {"peak": 2**24}}
    assert compare.compare(on("CPU"), on("CPU", **larger)).worse == []
    (said,) = compare.compare(on("A GPU"), on("A GPU", **larger)).worse
    assert said.startswith("mlp head, batch 64, tapeloop: peak ")


def test_nodes_count_though_a_framework_that_the_arm_does_not_use_is_another():
    after = [row | {"environment": {**row["environment"], "torch": "9.9"}} for row in rows_of(tapeloop={"nodes": 120})]
    assert compare.compare(rows_of(), after).worse == [
        "mlp head, batch 64, tapeloop: 100 to 120 nodes in the step's graph"
    ]


def test_other_machines_are_warned_of_and_their_nodes_are_no_alarm():
    after = rows_of(tapeloop={"nodes": 120})
    for row in after:
        row["environment"] = {**row["environment"], "tensorflow": "9.9"}
    verdict = compare.compare(rows_of(), after)
    assert verdict.worse == []
    assert verdict.said[0].startswith("WARNING: two machines or versions (tensorflow: ")


def test_compare_ends_with_1_where_something_got_worse(tmp_path, capsys):
    paths = [tmp_path / f"{name}.jsonl" for name in ("before", "same", "nodes", "slower")]
    planted = [{}, {}, {"tapeloop": {"nodes": 120}}, {"tapeloop": {"slower": 1.3}}]
    for path, some in zip(paths, planted):
        results.append(path, rows_of(**some))
    assert cli.main(["compare", str(paths[0]), str(paths[1])]) == 0
    assert "Nothing got worse." in capsys.readouterr().out
    assert cli.main(["compare", str(paths[0]), str(paths[2])]) == 1
    assert "WORSE: mlp head, batch 64, tapeloop: 100 to 120 nodes" in capsys.readouterr().out
    assert cli.main(["compare", str(paths[0]), str(paths[3]), "--no-remeasure"]) == 0
    said = capsys.readouterr().out
    assert "SUSPECTED: mlp head, batch 64, tapeloop: a step" in said
    assert "is known when it is measured again" in said


def exact(arm, step, peak, batch=64, kind="step", **more):
    """A row whose figures are round."""
    case = Case("mlp", "head", arm, batch, kind=kind)
    told = {"step_ms": step, "rounds_ms": [step] * 3, "fixed_ms": 1.0, "peak": peak * MIB, "persistent": MIB}
    parts = {"weight_bytes": MIB // 2, "optimizer_bytes": 8, "activation_bytes": (peak - 1) * MIB, "first_step_s": 1.0}
    return results.row_of(case, "ok", 1.0, **told, **parts, **more)


FIVE = [
    exact("forward", 1.0, 10), exact("full", 4.0, 50), exact("full+xla", 5.0, 60), exact("hand", 1.25, 10),
    exact("tapeloop", 1.5, 11),
]  # fmt: skip


def test_the_table_and_the_sentence_of_a_group():
    rows = [*FIVE, exact("tapeloop+cache", 0.3, 11)]
    frame = report.frame(rows)
    assert report.markdown(report.savings(frame)) == [
        "| what trains | forward ms | tapeloop ms | / forward | / by hand | / full | peak / forward | peak / full |"
        " / Keras | / PyTorch | / JAX | cached | unfolded | XLA |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| mlp head, batch 64 | 1 | 1.5 | 1.50 | 1.20 | 0.38 | 1.10 | 0.22 | - | - | - | 0.20 | - | - |",
    ]
    assert report.sentences(frame) == [
        "mlp, batch 64: training the head takes 0.38 of the time and 0.22 of the memory of full backprop."
    ]


def test_arms_of_a_feature_stand_beside_the_first():
    frame = report.frame([exact("tapeloop", 2.0, 10), exact("tapeloop+micro2", 3.0, 5)])
    table = report.group_table(frame, frame["group"][0])
    assert list(table["/ first"]) == ["1.00", "1.50"]
    assert list(table["peak / first"]) == ["1.00", "0.50"]
    assert report.savings(frame).empty
    assert "/ first" not in report.group_table(report.frame(FIVE), Case.of(FIVE[0]).group)


def test_full_backprop_that_was_measured_once_counts_for_all_selections():
    shared = [row | {"case": {**row["case"], "selection": "all"}} for row in FIVE[:2]]
    hand = FIVE[3] | {"case": {**FIVE[3]["case"], "selection": "all"}}
    frame = report.frame([*shared, hand, FIVE[4]])
    assert report.sentences(frame)[0].startswith("mlp, batch 64: training the head takes 0.38")
    assert list(report.savings(frame)["/ by hand"]) == ["-"]  # which does depend on what trains


def test_the_faster_counts_of_what_was_measured_for_all_selections_and_of_what_was_for_this_one():
    of_all = {"case": {**FIVE[1]["case"], "selection": "all"}}
    for own, shared, faster in ((5.0, 4.0, "0.38"), (3.0, 4.0, "0.50")):
        rows = [exact("full+xla", own, 60), exact("full", shared, 50) | of_all, FIVE[4]]
        assert report.sentences(report.frame(rows))[0].startswith(f"mlp, batch 64: training the head takes {faster}")


def test_arms_that_failed_or_compute_something_else_stand_in_no_comparison():
    check = results.row_of(
        Case("mlp", "head", "tapeloop", 4, kind="equivalence"), "ok", 1.0, said="x", invalid={"tapeloop": "it differs"}
    )
    frame = report.frame([*FIVE, check])
    assert report.sentences(frame) == []
    assert list(report.group_table(frame, frame["group"][0])[""]) == ["", "", "", "", "invalid"]
    failed = [{**FIVE[4], "status": "error", "error": "out of memory"}]
    frame = report.frame([*FIVE[:4], *failed])
    assert list(report.group_table(frame, frame["group"][0])[""])[-1] == "failed"
    assert report.sentences(frame) == []


def test_memory_is_that_of_the_case_that_measures_it_alone():
    alone = exact("tapeloop", 1.5, 7, kind="memory")
    del alone["rounds_ms"]
    frame = report.frame([*FIVE, alone])
    assert list(frame[frame["arm"] == "tapeloop"]["peak"]) == [7 * MIB]


def test_a_report_has_sentences_tables_and_pictures_in_markdown_and_html(tmp_path):
    rows = []
    for batch in (32, 64, 128):
        for arm in ARMS:
            step = {"forward": 1, "full": 4, "hand": 1.2, "tapeloop": 1.3}[arm] * batch / 64
            rows.append(exact(arm, step, batch // 8, batch))
    for depth in range(2, 4):
        case = Case("mobilenetv2", f"unfreeze-{depth}", "tapeloop", 8)
        rows.append(results.row_of(case, "ok", 1.0, **figures("tapeloop")))
    rows.append(results.row_of(Case("mobilenetv2", "all", "full", 8), "ok", 1.0, **figures("full")))
    for cap, batch in ((512, 100), (1024, 210)):
        case = Case("mlp", "head", "tapeloop", 1, kind="capacity", cap_mb=cap)
        rows.append(results.row_of(case, "ok", 1.0, largest_batch=batch))
    path = tmp_path / "results.jsonl"
    results.append(path, rows)
    assert cli.main(["report", str(path)]) == 0
    folder = tmp_path / "results"
    pictures = {found.name for found in folder.glob("*.png")}
    assert pictures == {
        "step-time.png", "peak-memory.png", "memory-against-time.png", "memory-parts.png", "batch.png", "depth.png",
        "largest-batch.png",
    }  # fmt: skip
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "- mlp, batch 32: training the head takes" in text
    assert "each of which is a line of `results.jsonl`" in text
    assert "| mlp head, batch 1, cap 512 MiB | tapeloop | capacity | 0 | batch 100 |" in text
    assert all(f"![{name.removesuffix('.png').replace('-', ' ')}]({name})" in text for name in pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "<li>mlp, batch 32: training the head takes" in page


def test_results_without_times_are_reported_too(tmp_path, capsys):
    case, path = Case("mlp", "head", "tapeloop", 1, kind="capacity", cap_mb=512), tmp_path / "results.jsonl"
    results.append(path, [results.row_of(case, "ok", 1.0, largest_batch=100)])
    assert cli.main(["report", str(path)]) == 0
    assert "| mlp head, batch 1, cap 512 MiB | tapeloop | capacity | 0 | batch 100 |" in capsys.readouterr().out


def test_results_of_several_versions_are_said_to_be_so():
    older = {**FIVE[0], "code": "another"}
    assert any("more than one version" in line for line in report.where([older, *FIVE[1:]], "a"))
    assert not any("more than one version" in line for line in report.where(FIVE, "a"))


def test_colours_are_those_of_the_arm():
    frame = report.frame(FIVE)
    assert len({plots.colour(frame, arm) for arm in frame["arm"]}) == len(set(frame["arm"]))
