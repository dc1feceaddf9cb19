"""Results as a frame, and the frame as sentences, tables and a report: what is saved, and at what cost."""

from __future__ import annotations

import base64
import dataclasses
import html
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.cases import ARMS, CHANGES, SHARED, Case
from benchmarks.measure import interval
from benchmarks.plots import MIB, draw
from benchmarks.results import Row, ended, newest

# What lines are compared with: the fastest of some arms of the same group. Arms that do not depend on what trains may
# stand with `all`, if they were measured once for all selections.
BASES = {
    "forward": ("forward",),
    "full": ("full", "full+xla"),
    "by hand": ("hand", "hand+xla"),
    "Keras": ("keras", "keras+tuned", "keras+xla"),
    "PyTorch": ("torch", "torch+compile"),
    "JAX": ("jax",),
}
TUNED = {"tuned", "compile", "xla"}  # changes that make an arm a tuned one
# Arms that are compared with `tapeloop`.
VARIANTS = {"cached": "tapeloop+cache", "unfolded": "tapeloop+plain", "XLA": "tapeloop+xla"}
TIMES = ("step_ms", "fixed_ms", "first_step_s", "compile_s", "examples_per_s", "joules_a_step")
BYTES = ("peak", "persistent", "growth", "weight_bytes", "optimizer_bytes", "data_bytes", "activation_bytes", "nodes")
SAID = {
    "all": "all of it", "head": "the head", "last_block": "the last block and the head", "biases": "the biases",
    "first_block": "the first block", "middle": "the first block and the head", "norm": "the norms",
    "lora": "low-rank terms (LoRA)",
}  # fmt: skip
HEAD = """<!doctype html><meta charset='utf-8'><title>Benchmarks</title>
<style>body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;
margin:1em 0;font-size:.85em}td,th{padding:.2em .7em;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}</style>"""


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a line for each arm of each group: its figures over all its processes, and what it takes of other arms.

    Times are medians over processes, with an interval of 95% in which processes are drawn again, and rounds in each.
    Memory is that of the case that measures it alone, or where there is none what was read beside the times.
    """
    found: dict[tuple[Case, str], dict[str, list[Row]]] = {}
    invalid: dict[Any, str] = {}
    for case, row in ((Case.of(row), row) for row in newest(rows)):
        if case.kind in ("step", "memory"):
            found.setdefault((case.group, case.arm), {"step": [], "memory": []})[case.kind].append(row)
        invalid |= {(_like(case), arm): why for arm, why in row.get("invalid", {}).items()}
    place = {what: number for number, what in enumerate(dict.fromkeys([*ARMS, *(group for group, _ in found)]))}
    lines = [
        {"group": group, "arm": arm, **_figures(**found[group, arm]), "invalid": invalid.get((_like(group), arm), "")}
        for group, arm in sorted(
            found, key=lambda line: (place[line[0]], place[line[1].split("+")[0]], line[1].count("+"), line[1])
        )
    ]
    columns = ["group", "arm", "error", "processes", *TIMES, *BYTES, "low", "high", "invalid"]
    return _compared(pd.DataFrame(lines, columns=columns))


def _like(case: Case) -> Any:
    """Return what an equivalence case shares with those that it vouches for: it is of a smaller batch and size."""
    return case.workload, case.selection, case.width, case.own


def _figures(step: list[Row], memory: list[Row]) -> dict[str, Any]:
    timed = [row for row in step if "rounds_ms" in row]
    errors = [row["error"] for row in (*step, *memory) if row["status"] == "error"]
    bounds = interval([row["rounds_ms"] for row in timed], np.random.default_rng(0)) if timed else (np.nan, np.nan)
    figures: dict[str, Any] = {"error": errors[0] if errors else "", "processes": len(timed)}
    for names, some in ((TIMES, timed), (BYTES, [row for row in memory if "peak" in row] or timed)):
        figures |= pd.DataFrame(some).reindex(columns=names).astype(float).median().to_dict()
    return {**figures, "low": bounds[0], "high": bounds[1]}


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Add to lines what they take of other arms, and the bounds of what they take of full backprop."""
    is_valid = ((frame["step_ms"] > 0) & (frame["error"] + frame["invalid"] == "")).astype(bool)
    valid, group = frame[is_valid].sort_values("step_ms", kind="stable"), frame["group"]
    of_all = group.map(lambda one: dataclasses.replace(one, selection="all"))
    for name, arms in BASES.items():
        fastest = valid[valid["arm"].isin(arms)].drop_duplicates("group").set_index("group")
        base = fastest.reindex(group).set_axis(frame.index)
        if set(arms) <= set(SHARED):
            other = fastest.reindex(of_all).set_axis(frame.index)
            base = base.where(base["step_ms"].fillna(np.inf) <= other["step_ms"].fillna(np.inf), other)
        for ratio, what in ((f"/ {name}", "step_ms"), (f"peak / {name}", "peak")):
            frame[ratio] = (frame[what] / base[what]).where(is_valid)
        frame[f"{name} ms"] = base["step_ms"]
        if name == "full":
            is_sure = is_valid & (frame["processes"] > 1) & (base["processes"] > 1)
            frame["least"] = (frame["low"] / base["high"]).where(is_sure)
            frame["most"] = (frame["high"] / base["low"]).where(is_sure)
    for name, arm in VARIANTS.items():
        frame[name] = group.map(valid[valid["arm"] == arm].set_index("group")["step_ms"]) / frame["step_ms"]
    return frame


def number(value: Any) -> str:
    """Return a figure of three digits, or `-`."""
    return "-" if pd.isna(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def share(value: Any) -> str:
    """Return a ratio of two decimals, or `-`."""
    return "-" if pd.isna(value) else f"{value:.2f}"


def mib(value: Any) -> str:
    """Return bytes as MiB, or `-`."""
    return "-" if pd.isna(value) else f"{value / MIB:,.1f}"


# The columns of tables: what they are called, of what they are made, and how that is written.
SAVINGS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "what trains": ("group", str), "forward ms": ("forward ms", number), "tapeloop ms": ("step_ms", number),
    **{name: (name, share) for name in ("/ forward", "/ by hand", "/ full", "peak / forward", "peak / full", "/ Keras",
                                        "/ PyTorch", "/ JAX", *VARIANTS)},
}  # fmt: skip
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "arm": ("arm", str), "as": ("as", str), "step ms": ("step_ms", number), "from": ("low", number),
    "to": ("high", number), "/ forward": ("/ forward", share), "/ full": ("/ full", share),
    "/ first": ("/ first", share), "peak / first": ("peak / first", share), "fit ms": ("fixed_ms", number),
    "compile s": ("compile_s", number),
    "examples/s": ("examples_per_s", number), "J a step": ("joules_a_step", number), "peak MiB": ("peak", mib),
    "weights": ("weight_bytes", mib), "optimizer": ("optimizer_bytes", mib), "activations": ("activation_bytes", mib),
    "nodes": ("nodes", number), "": ("note", str),
}  # fmt: skip


def _shown(lines: pd.DataFrame, columns: dict[str, tuple[str, Callable[[Any], str]]]) -> pd.DataFrame:
    return pd.DataFrame({title: lines[name].map(write) for title, (name, write) in columns.items()})


def savings(frame: pd.DataFrame) -> pd.DataFrame:
    """Say for each group how far tapeloop is from the forward pass alone, from code by hand, and from full backprop."""
    compared = frame[["/ forward", "/ full", "/ by hand"]].notna().any(axis=1)
    return _shown(frame[(frame["arm"] == "tapeloop") & compared], SAVINGS)


def sentences(frame: pd.DataFrame) -> list[str]:
    """Say for each group in a plain sentence what tapeloop saves of full backprop."""
    said = []
    for _, line in frame[(frame["arm"] == "tapeloop") & frame["/ full"].notna()].iterrows():
        group, peak = line["group"], line["peak / full"]
        bounds = "" if pd.isna(line["least"]) else f" ({line['least']:.2f} to {line['most']:.2f})"
        memory = "" if pd.isna(peak) else f" and {peak:.2f} of the memory"
        what = SAID.get(group.selection, group.selection)
        named = str(group).replace(f" {group.selection}", "", 1)
        said.append(
            f"{named}: training {what} takes {line['/ full']:.2f}{bounds} of the time{memory} of full backprop."
        )
    return said


def group_table(frame: pd.DataFrame, group: Case) -> pd.DataFrame:
    """Return all figures of the arms of a group, those that there are."""
    some = frame[frame["group"] == group]
    is_tuned = [ARMS[base][0] == "tuned" or bool(TUNED & {*changes}) for base, *changes in some["arm"].str.split("+")]
    notes = np.select([some["error"] != "", some["invalid"] != ""], ["failed", "invalid"], "")
    added: dict[str, Any] = {"note": notes, "as": np.where(is_tuned, "tuned", "defaults")}
    for name, what in (("/ first", "step_ms"), ("peak / first", "peak")):  # where it is not said of full backprop
        added[name] = np.nan if some["/ full"].notna().any() else some[what] / some[what].iloc[0]
    table = _shown(some.assign(**added), FIGURES)
    return table.loc[:, [name for name in table if not table[name].isin(["-", ""]).all()]]


def others(rows: Sequence[Row]) -> pd.DataFrame:
    """Return what cases beside times and memory found: the largest batch, the time to an accuracy, checkpoints."""
    lines = []
    for case, row in ((Case.of(row), row) for row in newest(rows)):
        if case.kind not in ("step", "memory"):
            found = row.get("said") or (f"batch {row['largest_batch']}" if "largest_batch" in row else row.get("error"))
            lines.append((str(case), case.arm, case.kind, case.process, found))
    return pd.DataFrame(lines, columns=["what", "arm", "kind", "process", "found"])


def legend(frame: pd.DataFrame) -> list[str]:
    """Say what the arms are that a frame has."""
    parts = {part for arm in frame["arm"] for part in arm.split("+")}
    lines = [f"`{arm}` ({kind}): {said}" for arm, (kind, said) in ARMS.items() if arm in parts]
    return lines + [f"`+{change}`: {said}" for change, said in CHANGES.items() if change in parts]


def markdown(table: pd.DataFrame) -> list[str]:
    """Return a table in Markdown, the first column to the left."""
    if table.empty:
        return ["Nothing was measured."]
    cells = [table.columns, ["---", *["--:"] * (len(table.columns) - 1)], *table.astype(str).to_numpy()]
    return [f"| {' | '.join(row)} |" for row in cells]


def parts(rows: Sequence[Row], frame: pd.DataFrame, pictures: Sequence[str], source: str) -> list[tuple[str, Any]]:
    """Return what is said of results in a file of that name, in order: each part with its kind.

    Those are headings, paragraphs, lists, tables and pictures.
    """
    found: list[tuple[str, Any]] = [("h1", "Benchmarks"), *(("p", line) for line in where(rows, source))]
    if not (table := savings(frame)).empty:
        found += [("h2", "What is saved"), ("list", sentences(frame)), ("table", table)]
    found += [("picture", name) for name in pictures]
    if not (table := others(rows)).empty:
        found += [("h2", "Limits and checks"), ("table", table)]
    found += [("h2", "All figures"), ("list", legend(frame))]
    for group, lines in frame.groupby("group", sort=False):
        found += [("h3", str(group)), ("table", group_table(frame, group))]
        for arm, error, invalid in lines[["arm", "error", "invalid"]].itertuples(index=False):
            if error or invalid:
                said = f"failed: {error}" if error else f"computes something else: {invalid}"
                found.append(("p", f"`{arm}` {said}"))
    return found


def as_markdown(kind: str, what: Any) -> str:
    """Return a part of a report in Markdown."""
    if kind == "table":
        return "\n".join(markdown(what))
    if kind == "list":
        return "\n".join(f"- {line}" for line in what) or "Nothing can be compared."
    if kind == "picture":
        return f"![{what.removesuffix('.png').replace('-', ' ')}]({what})"
    return what if kind == "p" else f"{'#' * int(kind[1:])} {what}"


def as_html(kind: str, what: Any, folder: pathlib.Path) -> str:
    """Return a part of a report in HTML, which holds the pictures of a folder."""
    if kind == "table":
        return what.to_html(index=False, border=0)
    if kind == "list":
        return "\n".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in what), "</ul>"])
    if kind == "picture":
        data = base64.b64encode((folder / what).read_bytes()).decode()
        return f"<img alt='{what}' src='data:image/png;base64,{data}'>"
    return f"<{kind}>{html.escape(what)}</{kind}>"


def where(rows: Sequence[Row], source: str) -> list[str]:
    """Say where and how results were measured."""
    some = newest(ended(rows))
    machines = []
    for on in (row["environment"] for row in some):
        device = f"{on['cores']} cores of {on['processor']}" if on["device"] == "CPU" else on["device"]
        names = ("TensorFlow", "Keras", "PyTorch", "Lightning", "JAX")
        versions = zip(names, ("tensorflow", "keras", "torch", "lightning", "jax"))
        machines.append(", ".join([device, *(f"{name} {on[key]}" for name, key in versions if on.get(key))]))
    on, at = " and on ".join(dict.fromkeys(machines)), ", ".join(sorted({row["commit"] or row["code"] for row in some}))
    lines = [
        f"Measured on {on}, at {at}; {len(some)} processes, each of which is a line of `{source}`. A step is what it "
        "takes more to run a longer round than a shorter one, by the number of steps: the median over processes, with "
        "an interval of 95% in which processes are drawn again, and rounds in each. Memory is that of TensorFlow's own "
        "allocator."
    ]
    if len({row["code"] for row in some}) > 1:
        lines.append("**These are results of more than one version of the code.**")
    cut = len(rows) - len(ended(rows))
    return lines + [f"**{cut} cases were cut off by a time limit, and are not here.**"] * bool(cut)


def write(rows: Sequence[Row], folder: pathlib.Path, source: str) -> str:
    """Write `report.md`, `report.html` and the pictures into a folder, and return what stands at the top of it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = frame(rows)
    found = parts(rows, lines, draw(lines, list(rows), folder), source)
    page = [HEAD, *(as_html(kind, what, folder) for kind, what in found)]
    (folder / "report.md").write_text("\n\n".join(as_markdown(*part) for part in found) + "\n")
    (folder / "report.html").write_text("\n".join(page) + "\n")
    if not (table := savings(lines)).empty:
        return "\n".join([*sentences(lines), "", *markdown(table)])
    if lines.empty:
        return "\n".join(markdown(others(rows)))
    groups = dict.fromkeys(lines["group"])  # of a feature, each arm beside the first
    return "\n".join("\n".join([f"\n{group}", *markdown(group_table(lines, group))]) for group in groups)
