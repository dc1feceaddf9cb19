"""The floors, the sizes of files, and that there are no cycles."""

import ast
import pathlib

import pytest

from tests.parts import part

PACKAGE = pathlib.Path(__file__).parent.parent / "tapeloop"
FLOORS = {
    "errors": 0, "checks": 0, "_compat": 0, "tree": 0, "mincut": 0, "digest": 0,
    "where": 1, "selection": 1, "rates": 1, "batch": 1, "disconnected": 1, "tally": 1, "pace": 1,
    "graph": 1,
    "ordinal": 2, "policy": 2, "modes": 2, "objective": 2, "tape": 2, "average": 2, "microbatch": 2, "feed": 2,
    "marks": 2, "rows": 2, "obstacles": 3,
    "schedule": 3, "layerwise": 3, "select": 3, "calling": 3, "stream": 3, "arrays": 3,
    "progress": 3, "report": 3, "history": 3,
    "optim": 3, "clipping": 3, "guard": 3, "remat": 3, "frontier": 4, "step": 5,
    "data": 5, "updates": 4, "transaction": 6, "steps": 7, "selections": 8, "body": 8, "loop": 9, "readings": 10,
    "given": 6, "saving": 5, "passes": 7, "store": 3, "cache": 8, "trainer": 11, "__init__": 12,
}  # fmt: skip
# On the ground floor, what a file of it may build on.
BELOW = {"tree": {"_compat"}}


def imports(name):
    """The files of the package that a file imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "tapeloop":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tapeloop."):
            yield node.module.removeprefix("tapeloop.")
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("tapeloop")]


def test_every_file_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_a_file_imports_from_lower_floors_only(name):
    for imported in imports(name):
        assert FLOORS[imported] < FLOORS[name] or imported in BELOW.get(name, ()), f"{name} imports {imported}"


@pytest.mark.parametrize("name", FLOORS)
def test_imports_stand_at_the_top(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    inside = [node for top in tree.body for node in ast.walk(top) if node is not top]
    assert not [node.lineno for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", sorted(PACKAGE.parent.glob("[a-z]*/*.py")), ids=lambda path: path.name)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", sorted(set(FLOORS) - {"_compat"}))
def test_private_names_of_keras_and_tensorflow_are_used_in_compat_alone(name):
    source = (PACKAGE / f"{name}.py").read_text()
    assert "keras.src" not in source
    assert "tensorflow.python" not in source
    own = {"_children", "_key"}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            assert (isinstance(owner, ast.Name) and owner.id in ("self", "other")) or node.attr in own, (
                f"{name}.py:{node.lineno} uses {node.attr}"
            )


# Whose tests stand in another file than `test_<name>.py`, and in which.
TESTED_IN = {
    "_compat": "compat", "checks": "errors", "selection": "policy", "select": "policy", "modes": "contract",
    "calling": "trainer", "steps": "trainer", "body": "updates", "tape": "updates",
    "clipping": "updates", "transaction": "guard", "layerwise": "schedule", "ordinal": "where", "rates": "optim",
    "batch": "data", "history": "phases", "selections": "phases", "tally": "guard", "feed": "stream",
    "__init__": "readme", "digest": "store", "graph": "frontier", "marks": "frontier", "rows": "frontier",
    "readings": "trainer", "given": "cache", "saving": "cache", "passes": "cache", "obstacles": "frontier",
}  # fmt: skip


@pytest.mark.parametrize("name", FLOORS)
def test_every_file_has_its_tests(name):
    assert (PACKAGE.parent / "tests" / f"test_{TESTED_IN.get(name, name)}.py").exists()
    assert name not in TESTED_IN or not (PACKAGE.parent / "tests" / f"test_{name}.py").exists()


def test_the_parts_of_the_tests_are_all_of_them():
    files = [path.name for path in (PACKAGE.parent / "tests").glob("test_*.py")]
    first, second = part(files, "1/2"), part(files, "2/2")
    assert first | second == set(files)
    assert not first & second
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ValueError, match="`--part` must be such as 1/2"):
            part(files, wrong)
