"""Whether another process finds classes and functions by their names, and the script that some of them stand in."""

from __future__ import annotations

import ast
import inspect
import io
import json
import pathlib
import runpy
import sys
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

# Pickled by Python itself, and found under no name.
NAMELESS = type(None), type(NotImplemented), type(Ellipsis)


class Unsendable(TypeError):
    """Something cannot be sent to another process."""


class Importable:
    """Checks that another process finds things by their names, and notes what stands in the script that runs."""

    def __init__(self) -> None:
        self._in_main: list[str] = []

    def check(self, found: Any) -> None:
        """Check a class or a function.

        Raises:
            Unsendable: Another process does not find it.
        """
        if found in NAMELESS:
            return
        if _found(found.__module__, found.__qualname__) is not found:
            raise _nameless(found.__module__, found.__qualname__)
        if found.__module__ == "__main__":
            self._in_main.append(found.__qualname__)

    def main(self) -> str | None:
        """Return the script that another process must run to find things, or None if there is none such.

        Raises:
            Unsendable: There is no file of it, or to run it would be to train.
        """
        if not self._in_main:
            return None
        name, path = self._in_main[0], getattr(sys.modules["__main__"], "__file__", None)
        if path is None or not pathlib.Path(path).is_file():
            raise Unsendable(
                f"`{name}` is defined in a notebook or a session of Python, which another process cannot import: "
                "define it in a module of its own"
            )
        if not _is_guarded(pathlib.Path(path).read_text()):
            raise Unsendable(
                f"`{name}` is defined in the script that runs, which another process must run to find it, and would "
                "train from the start: put the training under `if __name__ == '__main__':`, or define it in a module "
                "of its own"
            )
        return str(path)


class Main:
    """The script of the program, as another process imports it."""

    is_running = False

    @classmethod
    def run(cls, path: str) -> None:
        """Run it under another name, so that what is under `if __name__ == "__main__":` does not."""
        cls.is_running = True
        try:
            contents = runpy.run_path(path, run_name="__mp_main__")
        finally:
            cls.is_running = False
        module = types.ModuleType("__mp_main__")
        vars(module).update(contents)
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def custom_objects(config: Any, holders: Iterable[Any]) -> dict[str, Any]:
    """Return the user's classes and functions in a config of Keras', by the names under which Keras looks for them.

    Args:
        config: The config.
        holders: The objects that it is of. It says no more of a function than its name.

    Raises:
        Unsendable: A class is not found by its name.
    """
    entries = list(_entries(config))
    names = {entry["config"] for entry in entries if entry["class_name"] == "function"}
    found = {entry["registered_name"]: _class_of(entry) for entry in entries if entry["class_name"] != "function"}
    for held in _leaves([list(vars(holder).values()) for holder in holders]):
        if inspect.isfunction(held) and held.__name__ in names and not _is_of_keras(held.__module__):
            found[held.__name__] = held
    return found


def config_in(archive: bytes) -> Any:
    """Return the config in a file of Keras'."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return json.loads(opened.read("config.json"))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists, tuples and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a config that name functions, or classes that are not Keras' own."""
    if isinstance(config, dict):
        kind, name = config.get("class_name"), config.get("registered_name")
        if isinstance(kind, str) and isinstance(name, str) and "module" in config:
            is_named = kind != "function" or isinstance(config["config"], str)
            if is_named and (kind == "function" or not _is_of_keras(config["module"])):
                yield config
        config = [inner for name, inner in config.items() if name != "compile_config"]
    if isinstance(config, (list, tuple)):
        for each in config:
            yield from _entries(each)


def _class_of(entry: Mapping[str, Any]) -> Any:
    # Keras leaves out the name of the script's module.
    module, name = entry["module"] or "__main__", entry["class_name"]
    found = keras.saving.get_registered_object(entry["registered_name"]) or _found(module, name)
    if found is None:
        raise _nameless(module, name)
    return found


def _is_of_keras(module: str | None) -> bool:
    # Those of keras-hub, too, Keras imports by itself.
    return module is not None and (module.startswith("keras") or module.partition(".")[0] in ("builtins", "tensorflow"))


def _found(module: str, name: str) -> Any:
    """Return what stands in a module under a name, or None."""
    there: Any = sys.modules.get(module)
    for part in name.split("."):
        there = getattr(there, part, None)
    return there


def _nameless(module: str, name: str) -> Unsendable:
    return Unsendable(
        f"`{name}` of `{module}` is not found by its name, as what is made in a function, or by `lambda`, is not: "
        "define it at the top of a module"
    )


def _is_guarded(source: str) -> bool:
    """Tell whether a script has parts that run only if it is the program."""
    tests = [ast.unparse(node.test) for node in ast.parse(source).body if isinstance(node, ast.If)]
    return any("__name__" in test and "__main__" in test for test in tests)
