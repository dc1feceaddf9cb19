"""The figures of the front page, of the page on benchmarks and of the guides are those of the committed results."""

import json
import pathlib
import re

import pytest

from benchmarks import cases, report, results
from benchmarks.cases import Case

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MLP, MOBILENET, RESNET = "mlp all, batch 64", "mobilenetv2 head, batch 16, size 96", "resnet50 head, batch 16, size 96"
EFFICIENTNET = "efficientnetv2b0 head, batch 16, size 96"
BLOCKS = "resnet50-blocks all, batch 64, size 96"
# What tables say of two arms, a step of one divided by a step of the other: by guide and suite, a line's text, the
# group, and both arms.
RATIOS = {
    ("caching", "cache"): [
        ("MobileNetV2, from the cache / without it", MOBILENET, "tapeloop+cache", "tapeloop"),
        ("MobileNetV2, from the cache / by hand on stored features", MOBILENET, "tapeloop+cache", "hand+features"),
        ("ResNet50, from the cache / without it", RESNET, "tapeloop+cache", "tapeloop"),
        ("ResNet50, from the cache / by hand on stored features", RESNET, "tapeloop+cache", "hand+features"),
    ],
    ("data", "loop"): [
        ("an MLP, batch 64 / Keras' `fit`", MLP, "tapeloop", "keras"),
        ("the same / Keras' `fit` with `steps_per_execution=16`", MLP, "tapeloop", "keras+tuned"),
        ("the same / by hand, with a check for Inf and NaN", MLP, "tapeloop", "hand+guard"),
        ("the same / by hand, without it", MLP, "tapeloop", "hand"),
        ("the same with three metrics and a progress bar / without", MLP, "tapeloop+metrics", "tapeloop"),
        ("the same from a dataset / by hand from it, with the check", MLP, "tapeloop+dataset", "hand+guard+dataset"),
        ("the same from a dataset / Keras, 16 steps a call", MLP, "tapeloop+dataset", "keras+tuned+dataset"),
        ("the same from a dataset / from arrays", MLP, "tapeloop+dataset", "tapeloop"),
        ("the head of a MobileNetV2 / its forward pass alone", MOBILENET, "tapeloop", "forward"),
        ("the same, not folded / its forward pass alone", MOBILENET, "tapeloop+plain", "forward"),
        ("the head of a ResNet50 / its forward pass alone", RESNET, "tapeloop", "forward"),
        ("the same, not folded / its forward pass alone", RESNET, "tapeloop+plain", "forward"),
        ("the head of a ResNet50 / PyTorch", RESNET, "tapeloop", "torch"),
        ("the head of an EfficientNetV2B0 / its forward pass alone", EFFICIENTNET, "tapeloop", "forward"),
        ("the same, not folded / its forward pass alone", EFFICIENTNET, "tapeloop+plain", "forward"),
        ("all of a ResNet50 / by hand, with the check", "resnet50 all, batch 16, size 96", "tapeloop", "hand+guard"),
        ("adapters in a frozen encoder / by hand, with the check", "encoder adapters, batch 16, size 64", "tapeloop",
         "hand+guard"),
    ],
    ("callbacks", "callbacks"): [
        ("tapeloop, a callback that looks at epochs / none", MLP, "tapeloop+looks", "tapeloop"),
        ("tapeloop, one that looks at batches / none", MLP, "tapeloop+watches", "tapeloop"),
        ("Keras' `fit`, one that looks at batches / none", MLP, "keras+watches", "keras"),
        ("tapeloop / Keras' `fit`, no callback", MLP, "tapeloop", "keras"),
        ("tapeloop / Keras' `fit`, one that looks at batches", MLP, "tapeloop+watches", "keras+watches"),
    ],
    ("reinforcement-learning", "on_batch"): [
        ("MLP, batch 64", MLP, "tapeloop+onbatch", "keras+onbatch"),
        ("MobileNetV2, the head, batch 16", MOBILENET, "tapeloop+onbatch", "keras+onbatch"),
    ],
    ("precision-and-memory", "microbatches"): [
        ("two micro-batches", BLOCKS, "tapeloop+micro2", "tapeloop"),
        ("four", BLOCKS, "tapeloop+micro4", "tapeloop"),
        ("eight", BLOCKS, "tapeloop+micro8", "tapeloop"),
        ("rematerialized blocks", BLOCKS, "tapeloop+remat", "tapeloop"),
    ],
}  # fmt: skip


def lines_of(suite):
    """The lines of the committed results of a suite: by group and arm."""
    frame = report.frame(results.load(RESULTS / f"{suite}.jsonl"))
    return frame.assign(group=frame["group"].map(str)).set_index(["group", "arm"])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_results_are_of_cases_that_the_suite_has_today(path):
    rows = results.newest(results.load(path))
    assert set(map(Case.of, rows)) <= set(cases.suite(path.stem))
    assert [row["error"] for row in rows if row["status"] != "ok"] == []
    assert [row["invalid"] for row in rows if row.get("invalid")] == []


@pytest.mark.parametrize("suite", ["quick", "cpu"])
def test_the_page_shows_the_committed_results(suite):
    rows, page = results.load(RESULTS / f"{suite}.jsonl"), (ROOT / "docs" / "benchmarks.md").read_text()
    frame = report.frame(rows)
    table = "\n".join(report.markdown(report.savings(frame)))
    assert table in page
    assert table in (RESULTS / suite / "report.md").read_text()
    assert set(map(Case.of, rows)) == set(cases.suite(suite))
    pictures = re.findall(rf"results/{suite}/(.*?\.png)\)", page)
    assert pictures
    assert set(pictures) <= {found.name for found in (RESULTS / suite).glob("*.png")}


@pytest.mark.parametrize(
    ("said", "group"),
    [
        ("the head of a MobileNetV2, 96x96, batch 16", MOBILENET),
        ("the last block of that MobileNetV2, and its head", "mobilenetv2 last_block, batch 16, size 96"),
        ("the head of a ResNet50, 96x96, batch 16", RESNET),
        ("LoRA, low-rank terms in a frozen encoder, 64 tokens, batch 16", "encoder lora, batch 16, size 64"),
    ],
)
def test_the_front_page_shows_the_committed_results(said, group):
    line = lines_of("cpu").loc[group, "tapeloop"]
    times = [report.share(line[ratio]) for ratio in ("/ forward", "/ by hand", "/ full")]
    peaks = [report.share(line[ratio]) for ratio in ("peak / forward", "peak / full")]
    cells = [said, f"{report.number(line['step_ms'])} ms", *times, f"{report.mib(line['peak'])} MiB", *peaks]
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def test_the_page_shows_how_large_the_workloads_are():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) MiB \|", page, re.MULTILINE))
    found: dict[str, list[str]] = {}
    for row in results.load(RESULTS / "cpu.jsonl"):
        case = Case.of(row)
        if case.kind == "memory" and case.width == 1 and case.selection not in cases.ADDED and not case.changes:
            found.setdefault(case.workload, []).append(report.mib(row["weight_bytes"]))
    assert {name: [weights] for name, weights in shown.items()} == {name: [*set(said)] for name, said in found.items()}


def cells_of(guide, suite):
    """The lines that a guide's table has: times, and where they were measured for it the memory above what persists."""
    lines = lines_of(suite)
    for said, group, one, other in RATIOS[guide, suite]:
        figures = [lines.loc[group, arm] for arm in (one, other)]
        shown = [f"{report.number(line['step_ms'])} ms" for line in figures]
        ratio = figures[0]["step_ms"] / figures[1]["step_ms"]
        cells = [said, *shown, report.share(ratio) if ratio > 0.1 else report.number(ratio)]
        if suite == "microbatches":
            peaks = [line["activation_bytes"] for line in figures]
            cells = [said, shown[0], cells[-1], f"{report.mib(peaks[0])} MiB", report.share(peaks[0] / peaks[1])]
        yield cells


@pytest.mark.parametrize(("guide", "suite"), RATIOS)
def test_a_guide_shows_the_committed_results_of_a_feature(guide, suite):
    page = (ROOT / "docs" / "guides" / f"{guide}.md").read_text()
    for cells in cells_of(guide, suite):
        assert f"| {' | '.join(cells)} |" in page
    assert f"results/{suite}.jsonl" in page


def tuned_cells():
    """The lines of the guide's table of models that were tuned."""
    said = {
        "encoder": "encoder, adapters",
        "vit": "ViT, normalizations",
        "mlp": "MLP, all",
        "mobilenetv2": "MobileNetV2, head",
    }
    for row in json.loads((RESULTS / "tune.json").read_text()):
        picked = f"`{row['picked']}`" if row["picked"] else "as it is"
        yield [said[row["model"]], f"{row['seconds']:.0f}", picked, f"{row['ratio']:.2f}"]


def test_the_guide_shows_what_tuning_chose():
    page = (ROOT / "docs" / "guides" / "tuning.md").read_text()
    assert len(list(tuned_cells())) == 4
    for cells in tuned_cells():
        assert f"| {' | '.join(cells)} |" in page
    tables = {row["model"]: row["table"] for row in json.loads((RESULTS / "tune.json").read_text())}
    assert tables["vit"].strip() in page


def test_the_guide_shows_what_workers_took_and_sent():
    document = (ROOT / "docs" / "guides" / "distribution.md").read_text()
    found = {(row["selection"], row["workers"]): row for row in json.loads((RESULTS / "workers.json").read_text())}
    for selection, said in (("all", "all of it trains"), ("head", "the head trains")):
        one, two = (found[selection, count] for count in (1, 2))
        line = f"| {said} | {one['step_ms']:.0f} ms | {two['step_ms']:.0f} ms | {two['bytes']:,} bytes |"
        assert line in document
        # What a ring of 1.25 GB/s and 50 us a message takes.
        waits = [2e3 * (n - 1) * (two["bytes"] / n / 1.25e9 + 50e-6) for n in (8, 64, 512)]
        assert f"| {said.removesuffix(' trains')} | {' | '.join(f'{wait:.1f} ms' for wait in waits)} |" in document
    assert found["head", 2]["bytes"] < 0.01 * found["all", 2]["bytes"]
