"""What the command line answers about checkpoints, without TensorFlow, whose import takes seconds."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tapeloop._table import format_bytes
from tapeloop.checkpoint.records import best_of
from tapeloop.cli.answer import Answer, table
from tapeloop.cli.visit import Folder, Visit
from tapeloop.errors import CheckpointError

LISTED = ("checkpoint", "step", "epoch", "phase", "saved at", "size", "", "state")


def listed(folder: pathlib.Path) -> Answer:
    """Return what checkpoints there are, each with its state as far as it shows without reading all of its bytes.

    Raises:
        BadUsage: There is no such folder.
        CheckpointError: There are no checkpoints in it.
    """
    visit = Visit(folder, every_byte=False)
    checkpoints, best = visit.checkpoints, _best(visit.checkpoints)
    rows, data = [], []
    for each in checkpoints:
        marks = {"newest": each is checkpoints[-1], "best": each.name == best}
        marked = ", ".join(name for name, is_so in marks.items() if is_so)
        rows.append((each.name, *_moment(each.record), format_bytes(each.bytes), marked, each.fault or "fine"))
        data.append({**_folder_data(each), **marks, **_listed_data(each.record)})
    shown: list[Any] = [table(LISTED, rows, right={"step", "epoch", "size"})]
    cells = []
    for key, each in visit.shared.items():
        users = sum(key in checkpoint.needs.items() for checkpoint in checkpoints)
        cells.append((each.name, f"{users}", format_bytes(each.bytes), each.fault or "fine"))
    if cells:
        shown += ["", table(("shared tensors", "used by", "size", "state"), cells, right={"used by", "size"})]
    shown += ["", f"The lists of files were looked at; `tapeloop checkpoints verify {folder}` reads every byte."]
    return _answer(folder, visit, shown, data)


def verified(folder: pathlib.Path) -> Answer:
    """Return whether every byte of every checkpoint is as it was written.

    Raises:
        BadUsage: There is no such folder.
        CheckpointError: There are no checkpoints in it.
    """
    visit = Visit(folder, every_byte=True)
    rows = [(each.name, format_bytes(each.bytes), each.fault or "fine") for each in visit.folders]
    # A checkpoint needs the tensors that it shares, even if its own files are as they were written.
    unusable = sum(each.fault is not None for each in visit.folders)
    folders = f"{len(rows)} folder{'s' * (len(rows) != 1)}"
    size = format_bytes(sum(each.bytes for each in visit.folders))
    result = (
        f"{unusable} of {folders} cannot be used."
        if unusable
        else f"{size} in {folders}: every byte is as it was written."
    )
    shown = [table(("folder", "size", "state"), rows, right={"size"}), "", result]
    return _answer(folder, visit, shown, [_folder_data(each) for each in visit.checkpoints])


def described(folder: pathlib.Path) -> Answer:
    """Return what a checkpoint, or the newest of several, says of its run.

    Raises:
        BadUsage: There is no such folder.
        CheckpointError: There is no checkpoint, or what it says cannot be read.
    """
    found = Visit(folder, every_byte=False).checkpoints[-1]
    if found.record is None:
        raise CheckpointError(f"What {found.path} says of its run cannot be read: {found.fault}.")
    rows = [("checkpoint", str(found.path)), ("state", found.fault or "fine"), *_run_lines(found.record)]
    rows.append(("size", ", ".join([format_bytes(found.bytes), *(f"and what {name} has" for name in found.needs)])))
    return Answer((table(("", ""), rows),), {**_folder_data(found), **_run_data(found.record)}, bool(found.fault))


def _answer(folder: pathlib.Path, visit: Visit, shown: Sequence[Any], checkpoints: Sequence[Any]) -> Answer:
    shared = [_folder_data(each) for each in visit.shared.values()]
    data = {"directory": str(folder), "checkpoints": checkpoints, "shared": shared}
    return Answer(shown, data, is_wrong=any(each.fault is not None for each in visit.folders))


def _best(checkpoints: Sequence[Folder]) -> str | None:
    """Return the name of the best checkpoint, by the log that the run was told to keep the best of."""
    records = {each.name: each.record for each in checkpoints if each.record is not None}
    # The option may have changed between the starts of a run: the last one counts.
    for record in reversed(records.values()):
        if record["epoch_logs"] and record.get("best"):
            return best_of(records, next(iter(record["epoch_logs"])), is_more_better=record["best"] == "max")
    return None


def _folder_data(folder: Folder) -> dict[str, Any]:
    return {"name": folder.name, "path": str(folder.path), "bytes": folder.bytes, "fault": folder.fault}


def _moment(record: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """Return the cells that say when a checkpoint was written."""
    if record is None:
        return "", "", "", ""
    return str(record["step"]), _epoch(record), (record["phase"] or record["policy"])["name"], record["saved_at"]


def _listed_data(record: Mapping[str, Any] | None) -> dict[str, Any]:
    names = "step", "epoch", "epoch_under_way", "policy", "phase", "saved_at"
    data = dict.fromkeys(names) if record is None else _run_data(record)
    return {name: data[name] for name in names}


def _epoch(record: Mapping[str, Any]) -> str:
    under_way = record["epoch_under_way"]
    return f"{record['epoch']}" + (f" + {under_way['drawn']} batches" if under_way else "")


def _run_data(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what machines are told of a run."""
    phase, under_way, history, optimizers = (
        record[name] for name in ("phase", "epoch_under_way", "history", "optimizers")
    )
    groups = [group for _, group in phase["groups"]] if phase else []
    return {
        **{name: record[name] for name in ("step", "epoch", "skipped_steps", "saved_at", "written_by", "policy")},
        "epoch_under_way": under_way and {"batches": under_way["drawn"], "logs": under_way["logs"]},
        "phase": phase and {"name": phase["name"], "variables": {name: groups.count(name) for name in groups}},
        "phases": [
            {"step": step, "epoch": epoch, "name": history["selections"][number]["name"]}
            for step, epoch, number in history["phases"]
        ],
        "logs": {name: values[-1] for name, values in history["history"].items()},
        "optimizers": [
            {
                "group": key or None,
                "kind": template["kind"],
                "learning_rate": template["now"],
                "cohorts": [
                    {"variables": len(cohort["variables"]), "groups": cohort["groups"]}
                    for cohort in optimizers["cohorts"]
                    if cohort["optimizer"] == key
                ],
            }
            for key, template in optimizers["configured"].items()
        ],
        "learning_rates_set": optimizers["learning_rates_set"],
        "ema": record["averages"]["decay"],
        "microbatches": record["microbatches"],
        "has_loss_scale": record["loss_scale"],
    }


def _run_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what people are told of a run, each line with what it is about."""
    data = _run_data(record)
    versions = ", ".join(f"{name} {version}" for name, version in data["written_by"].items())
    lines = [
        ("written", f"{data['saved_at']} by {versions}"),
        ("step", str(data["step"])),
        ("epoch", _epoch(record)),
        ("policy", data["policy"]["name"]),
        ("its state", json.dumps(data["policy"]["state"]) if data["policy"]["state"] else ""),
    ]
    lines += [("phase", f"from step {each['step']}, epoch {each['epoch']}: {each['name']}") for each in data["phases"]]
    groups = data["phase"]["variables"] if data["phase"] else {}
    lines += [("trains", ", ".join(f"{name}: {count} variables" for name, count in groups.items()))]
    lines += [
        ("logs", _numbers(data["logs"])),
        ("logs so far", _numbers((data["epoch_under_way"] or {}).get("logs") or {})),
    ]
    for each in data["optimizers"]:
        of, count = f" of {each['group']}" if each["group"] else "", sum(c["variables"] for c in each["cohorts"])
        text = f"{each['kind']}{of}, learning rate {_number(each['learning_rate'])}, state of {count} variables"
        lines.append(("optimizer", text))
    lines += [("rates set", _numbers(data["learning_rates_set"])), ("ema", _number(data["ema"] or ""))]
    lines.append(("skipped", f"{data['skipped_steps']} steps of the epoch" if data["skipped_steps"] else ""))
    return [(name, text) for name, text in lines if text]


def _numbers(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in numbers.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
