"""The names that `import tapeloop` gives, which come with the first use of one."""

import pytest

import tapeloop
from tapeloop import _public


def test_the_public_names_are_there_and_listed():
    assert set(_public.__all__) <= set(dir(tapeloop))
    assert all(getattr(tapeloop, name) is getattr(_public, name) for name in tapeloop.__all__)
    assert tapeloop.__all__ == sorted(tapeloop.__all__, key=lambda name: (not name[0].isupper(), name))


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match=r"^module 'tapeloop' has no attribute 'Trianer'$"):
        _ = tapeloop.Trianer


def test_all_names_can_be_imported_at_once():
    names = {}
    exec("from tapeloop import *", names)
    assert set(_public.__all__) <= names.keys()


def test_the_first_use_of_one_brings_all(monkeypatch):
    for name in ("Freeze", "Trainer", "__all__"):
        monkeypatch.delitem(vars(tapeloop), name, raising=False)  # as after an `import tapeloop` in a new process
    assert tapeloop.Trainer is _public.Trainer
    assert vars(tapeloop)["Freeze"] is _public.Freeze
    assert tapeloop.errors.PolicyError is tapeloop.PolicyError


def test_names_of_python_and_of_notebooks_import_nothing(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    for name in ("__wrapped__", "_repr_html_", "_ipython_display_"):
        assert not hasattr(tapeloop, name)
