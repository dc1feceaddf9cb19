"""Every public name says what it takes, returns and raises, and has an example that runs."""

import ast
import doctest
import functools
import inspect
import re
import textwrap

import keras
import numpy as np
import pytest

import tapeloop as tl
from tests.support.examples import ROOT

# What other folders of the package use, and the API pages leave out.
HIDDEN = re.search(r'"!\^\(([\w|]+)\)\$"', (ROOT / "mkdocs.yml").read_text())[1].split("|")
PROPERTIES = property, functools.cached_property


def members_of(kind):
    """The public methods and properties of a class, by name, those of Python's own classes left out."""
    own = {name for base in kind.__mro__ if base.__module__.startswith("tapeloop") for name in vars(base)}
    found = {name: inspect.getattr_static(kind, name) for name in sorted(own) if name[0] != "_" and name not in HIDDEN}
    return {name: one for name, one in found.items() if inspect.isfunction(one) or isinstance(one, PROPERTIES)}


CLASSES = {name: getattr(tl, name) for name in tl.__all__ if inspect.isclass(getattr(tl, name))}
# A policy's methods are documented in the base class.
MEMBERS = {
    f"{name}.{member}": one
    for name, kind in CLASSES.items()
    if not issubclass(kind, (tl.VariablePolicy, tl.Filter)) or kind in (tl.VariablePolicy, tl.Filter)
    for member, one in members_of(kind).items()
}
DOCUMENTED = {name: getattr(tl, name) for name in tl.__all__} | MEMBERS
EXAMPLES = {name: one for name, one in DOCUMENTED.items() if "Example:" in (inspect.getdoc(one) or "")}


def functions(name, documented):
    """What a docstring describes that takes arguments: a function, or the constructor of a class."""
    if inspect.isfunction(documented):
        return {name: documented}
    # A dataclass has a constructor that Python has written, whose arguments are the attributes.
    written = vars(documented).get("__init__") if inspect.isclass(documented) else None
    return {f"{name}.__init__": written} if inspect.isfunction(written) and written.__doc__ else {}


FUNCTIONS = {inner: function for name, one in DOCUMENTED.items() for inner, function in functions(name, one).items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(EXAMPLES[name]), {"tl": tl, "keras": keras, "np": np, "__name__": "__main__"}, name, name, 0
    )
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_there_is_an_example(name):
    if name in EXAMPLES:
        return
    # A property may be shown in the example of its class.
    assert isinstance(DOCUMENTED[name], PROPERTIES), f"{name} has no example"
    kind, member = name.split(".")
    assert re.search(rf"\.{member}\b", inspect.getdoc(CLASSES[kind]).split("Example:")[1])


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_its_attributes_are(name):
    said = inspect.getdoc(CLASSES[name])
    for field in getattr(CLASSES[name], "__dataclass_fields__", {}):
        assert field[0] == "_" or re.search(rf"^    {field}: \S", said, re.MULTILINE), field
    for member, one in members_of(CLASSES[name]).items():
        assert inspect.getdoc(one) or inspect.getdoc(getattr(tl.VariablePolicy, member)), member


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes(name):
    said = inspect.getdoc(FUNCTIONS[name])
    taken = inspect.signature(FUNCTIONS[name]).parameters.values()
    for argument in [f"{one.kind.name.count('VAR') * '*'}{one.name}" for one in taken if one.name != "self"]:
        starred = argument.replace("*", r"\*{1,2}")
        assert re.search(rf"^    {starred}: \S", said.split("Args:")[-1], re.MULTILINE), argument


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_returns_and_raises(name):
    function = FUNCTIONS[name]
    said, source = inspect.getdoc(function), ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(source)):
        assert "Raises:" in said
    returned = inspect.signature(function).return_annotation
    # What a context manager is good for, it says in its own words.
    if returned not in ("None", "NoReturn") and not hasattr(function, "__wrapped__"):
        first = said.split("\n\n")[0]
        assert "Returns:" in said or re.search(r"\breturn\b|^(Choose|Tell)\b", first, re.IGNORECASE), first
