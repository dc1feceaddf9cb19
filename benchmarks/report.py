"""A report of results, in Markdown and in HTML, with its pictures."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Sequence

import pandas as pd

from benchmarks import tables
from benchmarks.plots import draw
from benchmarks.results import Row, ended, newest

STYLE = """body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;
margin:1em 0;font-size:.85em}td,th{padding:.2em .7em;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}"""


class Report:
    """What is said of some results: headings, paragraphs, lists, tables and pictures, in order."""

    def __init__(self, rows: Sequence[Row], pictures: Sequence[str], source: str) -> None:
        """Put together what is said of results in a file of that name, with the pictures that stand beside it."""
        self.parts: list[tuple[str, object]] = []
        frame = tables.frame(rows)
        self.parts.append(("h1", "Benchmarks"))
        self.parts += [("p", line) for line in where(rows, source)]
        if not (floors := tables.floors(frame)).empty:
            self.parts += [("h2", "What is saved"), ("list", tables.sentences(frame)), ("table", floors)]
        self.parts += [("picture", name) for name in pictures]
        other = tables.others(rows)
        if not other.empty:
            self.parts += [("h2", "Limits and checks"), ("table", other)]
        self.parts += [("h2", "All figures"), ("list", tables.legend(frame))]
        for group in dict.fromkeys(frame["group"]):
            self.parts += [("h3", str(group)), ("table", tables.group_table(frame, group))]
            bad = frame[(frame["group"] == group) & ((frame["error"] != "") | (frame["invalid"] != ""))]
            for _, row in bad.iterrows():
                said = f"failed: {row['error']}" if row["error"] else f"computes something else: {row['invalid']}"
                self.parts.append(("p", f"`{row['arm']}` {said}"))

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines: list[str] = []
        for kind, what in self.parts:
            if kind == "table":
                assert isinstance(what, pd.DataFrame)
                lines += tables.markdown(what)
            elif kind == "list":
                assert isinstance(what, list)
                lines += [f"- {line}" for line in what] or ["Nothing can be compared."]
            elif kind == "picture":
                lines.append(f"![{str(what).removesuffix('.png').replace('-', ' ')}]({what})")
            else:
                lines.append(f"{'#' * int(kind[1:])} {what}" if kind != "p" else str(what))
            lines.append("")
        return "\n".join(lines).rstrip() + "\n"

    def html(self, folder: pathlib.Path) -> str:
        """Return it as one page of HTML, which holds the pictures of a folder."""
        lines = ["<!doctype html><meta charset='utf-8'><title>Benchmarks</title>", f"<style>{STYLE}</style>"]
        for kind, what in self.parts:
            if kind == "table":
                assert isinstance(what, pd.DataFrame)
                lines.append(what.to_html(index=False, border=0))
            elif kind == "list":
                assert isinstance(what, list)
                lines += ["<ul>", *(f"<li>{html.escape(line)}</li>" for line in what), "</ul>"]
            elif kind == "picture":
                data = base64.b64encode((folder / str(what)).read_bytes()).decode()
                lines.append(f"<img alt='{what}' src='data:image/png;base64,{data}'>")
            else:
                lines.append(f"<{kind}>{html.escape(str(what))}</{kind}>")
        return "\n".join(lines) + "\n"


def where(rows: Sequence[Row], source: str) -> list[str]:
    """Say where and how results were measured."""
    some = newest(ended(rows))
    machines = []
    for row in some:
        on = row["environment"]
        device = f"{on['cores']} cores of {on['processor']}" if on["device"] == "CPU" else on["device"]
        versions = [("TensorFlow", "tensorflow"), ("Keras", "keras"), ("PyTorch", "torch"), ("Lightning", "lightning")]
        installed = [f"{name} {on[key]}" for name, key in versions if on.get(key)]
        machines.append(f"{device}, {', '.join(installed)}")
    code = sorted({row["commit"] or row["code"] for row in some})
    on, at = " and on ".join(dict.fromkeys(machines)), ", ".join(code)
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
    frame = tables.frame(rows)
    report = Report(rows, draw(frame, list(rows), folder), source)
    (folder / "report.md").write_text(report.markdown())
    (folder / "report.html").write_text(report.html(folder))
    floors = tables.floors(frame)
    if not floors.empty:
        return "\n".join([*tables.sentences(frame), "", *tables.markdown(floors)])
    groups = dict.fromkeys(frame["group"])  # of a feature, each arm beside the first
    return "\n".join("\n".join([f"\n{group}", *tables.markdown(tables.group_table(frame, group))]) for group in groups)
