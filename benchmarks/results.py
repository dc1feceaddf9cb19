"""Results in a file: rows, the machine they are of, and the command that made them. Written whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Group

FORMAT = 1
MACHINE = ("processor", "cores", "system", "device")  # what tells one machine from another


class Results:
    """The rows of a run.

    Attributes:
        path: The file.
        machine: The machine, the device and the versions.
        command: The command that made them.
        rows: The rows.
        complete: Whether the run came to its end.
    """

    def __init__(self, path: pathlib.Path, command: str) -> None:
        """Begin with no rows."""
        self.path = path
        self.command = command
        self.machine: dict[str, Any] = machine()
        self.rows: list[dict[str, Any]] = []
        self.complete = False

    @classmethod
    def load(cls, path: pathlib.Path) -> Results:
        """Read results.

        Raises:
            ValueError: The file is none of results, or is cut short.
            FileNotFoundError: There is none.
        """
        try:
            found = json.loads(path.read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"`{path}` has the format {found['format']}, and this reads {FORMAT}. Measure anew.")
            results = cls(path, found["command"])
            results.machine, results.rows, results.complete = found["machine"], found["rows"], found["complete"]
            if (
                not all(row["arm"] and group_of(row) for row in results.rows)
                or not machine().keys() <= results.machine.keys()
            ):
                raise KeyError("rows or machine")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{path}` is no file of results, or was cut short ({error}). Delete it, and run the command that made "
                "it again."
            ) from error
        return results

    @classmethod
    def resume(cls, path: pathlib.Path, command: str) -> Results:
        """Go on with the results in a file, if they did not come to their end, or begin anew.

        Raises:
            ValueError: The file is of another command or machine, or is cut short.
        """
        if not path.exists():
            return cls(path, command)
        results, here = cls.load(path), machine()
        if results.complete and results.command == command:
            return cls(path, command)
        if results.command != command or any(results.machine[name] != here[name] for name in here):
            raise ValueError(
                f"`{path}` has results of another run: `{results.command}` on {results.machine['processor']}. "
                f"This is `{command}` on {here['processor']}. Give another `--out`, or delete it."
            )
        return results

    def has(self, group: Group) -> bool:
        """Tell whether there are rows of a group."""
        return any(group_of(row) == group for row in self.rows)

    def describe(self, found: dict[str, Any]) -> None:
        """Take in what a process says of its versions and devices.

        Raises:
            ValueError: They are not those of the rows that are there.
        """
        for name, value in found.items():
            if self.rows and self.machine.get(name, value) != value:
                raise ValueError(
                    f"`{self.path}` has rows of {name} {self.machine[name]}, and this is {value}. Give another "
                    "`--out`, or delete it."
                )
        self.machine |= found

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take in the rows of a group, and write."""
        self.rows += rows
        self.write()

    def write(self) -> None:
        """Write the file whole, or leave the one that is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "command": self.command,
            "complete": self.complete,
            "machine": self.machine,
            "rows": self.rows,
        }
        beside = self.path.with_name(self.path.name + ".writing")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, self.path)


def group_of(row: dict[str, Any]) -> Group:
    """Return the group of a row."""
    return Group(**{name: row[name] for name in Group.__dataclass_fields__})


def machine() -> dict[str, Any]:
    """Return what is known of this machine without TensorFlow."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    driver = pathlib.Path("/proc/driver/nvidia/version")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
        "seed": 0,
    }


def differences(one: Results, other: Results) -> list[str]:
    """Say in what the machines of two runs differ."""
    return [
        f"{name}: {one.machine.get(name)!r} and {other.machine.get(name)!r}"
        for name in (*MACHINE, "tensorflow", "keras")
        if one.machine.get(name) != other.machine.get(name)
    ]
