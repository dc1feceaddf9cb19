"""Whether another process finds things by their names, and the script that some of them stand in."""

import sys
import types

import pytest

from tapeloop.tuning.importable import Importable, Main, Unsendable
from tests.support import tuned


def noted(monkeypatch, path):
    """What is noted of a class of a script at this path, or of a session."""
    main = types.ModuleType("__main__")
    main.Own = type("Own", (), {"__module__": "__main__", "__qualname__": "Own"})
    if path is not None:
        main.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", main)
    importable = Importable()
    importable.check(main.Own)
    return importable


def test_what_stands_in_modules_needs_no_script():
    importable = Importable()
    for found in (tuned.Halved, tuned.doubled, type(None), int):
        importable.check(found)
    assert importable.main() is None


@pytest.mark.parametrize("guard", ["if __name__ == '__main__':", 'if "__main__" == __name__:'])
def test_a_script_with_a_guard_is_run_again(monkeypatch, tmp_path, guard):
    path = tmp_path / "program.py"
    path.write_text(f"class Own:\n    pass\n\n\n{guard}\n    raise SystemExit\n")
    assert noted(monkeypatch, path).main() == str(path)
    monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
    Main.run(str(path))
    assert sys.modules["__main__"].Own.__module__ == "__mp_main__"
    assert not Main.is_running


def test_one_without_a_guard_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "program.py"
    path.write_text("class Own:\n    if __name__ == '__main__':\n        pass\n")
    with pytest.raises(Unsendable, match=r"^`Own` is defined in the script .* under `if __name__ == '__main__':`, or"):
        noted(monkeypatch, path).main()


@pytest.mark.parametrize("path", [None, "<stdin>"])
def test_a_session_or_a_notebook_is_refused(monkeypatch, path):
    with pytest.raises(Unsendable, match=r"^`Own` is defined in a notebook or a session of Python, .* a module of its"):
        noted(monkeypatch, path).main()
