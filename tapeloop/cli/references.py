"""What a user names on the command line, as `package.module:name` or `file.py:name`, and Python expressions."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import pathlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from tapeloop.cli.answer import BadUsage

_REFERENCE = re.compile(r"(.+\.py|[^\W\d]\w*(?:\.\w+)*):([^\W\d]\w*(?:\.\w+)*)")
_PYTHONS = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_reference(text: str) -> bool:
    """Tell whether a text names an object in a module or file."""
    return _REFERENCE.fullmatch(text) is not None


def object_at(option: str, reference: str, is_wanted: Callable[[Any], bool] | None = None) -> Any:
    """Return an object that a user has named, or what it returns if it is a function or class to be called.

    Args:
        option: What the command line calls it.
        reference: `package.module:name` or `file.py:name`; the name may have dots.
        is_wanted: Tells whether an object is what is looked for, and so is not called, though it may be callable. By
            default, all that can be called is.

    Raises:
        BadUsage: There is no such module or name, it needs arguments, or the user's code raises.
    """
    found = _named_object(option, reference)
    if not callable(found) or (is_wanted is not None and is_wanted(found)):
        return found
    needed = _needed_arguments(found)
    if needed:
        raise BadUsage(
            f"{option}: `{reference}` needs arguments ({', '.join(needed)}), and is called without any. Write a "
            "function that takes none and calls it."
        )
    with _explained(f"{option}: `{reference}`"):
        return found()


def value_of(option: str, expression: str, names: Mapping[str, Any]) -> Any:
    """Return the value of a Python expression.

    Args:
        option: What the command line calls it.
        expression: The expression.
        names: The names that it may use beside Python's own.

    Raises:
        BadUsage: It cannot be evaluated.
    """
    with _explained(f"{option}: {expression!r}"):
        try:
            # The user's own shell: what stands there could as well be run by `python -c`.
            return eval(expression, dict(names))
        except NameError as error:
            near = difflib.get_close_matches(str(error.name), names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise BadUsage(
                f"{option}: in {expression!r}, `{error.name}` is no name of tapeloop's, `keras` or Python's.{hint}"
            ) from error


def error_line(error: BaseException) -> str:
    """Return an error as Python shows it in its last line."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _named_object(option: str, reference: str) -> Any:
    """Return the object that a reference names."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadUsage(
            f"{option} must be `package.module:name` or `file.py:name`, such as `mymodels:make_model`. "
            f"Received: {reference!r}."
        )
    home, name = match.groups()
    found: Any = _file(option, pathlib.Path(home).expanduser()) if home.endswith(".py") else _module(option, home)
    with _explained(f"{option}: `{reference}`"):
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError as error:
                if error.name != part:  # the user's own property looks for another
                    raise
                near = difflib.get_close_matches(part, [each for each in dir(found) if each[0] != "_"], n=3)
                hint = f" The nearest names are {', '.join(f'`{each}`' for each in near)}." if near else ""
                raise BadUsage(f"{option}: `{home}` has no `{name}`.{hint}") from error
    return found


def _module(option: str, name: str) -> ModuleType:
    _look_in(pathlib.Path.cwd())
    with _explained(f"{option}: importing `{name}`"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # The module itself or a package around it; a module that it imports in turn is another matter.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise BadUsage(
                f"{option}: there is no module `{error.name}`, neither in {pathlib.Path.cwd()} nor among the installed "
                "packages. Of a file, give the path: `folder/file.py:name`."
            ) from error


def _file(option: str, path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        raise BadUsage(f"{option}: there is no file {path}.")
    with _explained(f"{option}: {path}"):
        return _run_file(path.absolute())


@functools.cache
def _run_file(path: pathlib.Path) -> ModuleType:
    """Run a file as a module, once for all options that name it."""
    # As Python does for a script, whose imports are looked for beside it.
    _look_in(path.parent)
    others = (f"{path.stem}_of_the_command_line_{number}" for number in itertools.count(1))
    name = next(name for name in itertools.chain([path.stem], others) if name not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: pathlib.Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what the user's code raises, and where."""
    try:
        yield
    except BadUsage:
        raise
    except (Exception, SystemExit) as error:
        raise BadUsage(f"{what} raised {error_line(error)}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """Name the last line of the user's own that an error came through."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f" (line {own[-1].lineno} of {own[-1].filename})" if own else ""


def _is_own(filename: str) -> bool:
    """Tell whether a file is the user's, and neither Python's, a package's nor this package's."""
    others = *_PYTHONS, str(pathlib.Path(__file__).parents[1])
    # Code without a file has a name such as `<string>`.
    return not filename.startswith("<") and not any(pathlib.Path(filename).is_relative_to(folder) for folder in others)


def _needed_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C do not say
        return []
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return [each.name for each in named if each.default is each.empty]
