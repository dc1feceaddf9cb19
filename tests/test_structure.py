"""The floors, the sizes of files, and that there are no cycles."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "tapeloop"
FLOORS = {
    "_compat": 0, "checks": 0, "digest": 0, "errors": 0, "interrupts": 0, "mincut": 0, "progress": 0, "tally": 0,
    "batch": 1, "graph": 1, "pace": 1, "rates": 1, "store": 1, "tree": 1,
    "calling": 2, "disconnected": 2, "feed": 2, "following": 2, "microbatch": 2, "rows": 2, "selection": 2,
    "suitable": 2, "template": 2, "untracked": 2, "where": 2,
    "arrays": 3, "average": 3, "clipping": 3, "guard": 3, "marks": 3, "modes": 3, "objective": 3, "ordinal": 3,
    "policy": 3, "stream": 3, "tape": 3,
    "data": 4, "history": 4, "layerwise": 4, "logged": 4, "obstacles": 4, "optim": 4, "remat": 4, "report": 4,
    "schedule": 4, "select": 4,
    "frontier": 5, "given": 5, "updates": 5,
    "passes": 6, "saving": 6, "step": 6,
    "cache": 7, "transaction": 7,
    "steps": 8,
    "body": 9, "selections": 9,
    "loop": 10,
    "readings": 11,
    "trainer": 12,
    "__init__": 13,
}  # fmt: skip


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
        assert FLOORS[imported] < FLOORS[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", FLOORS)
def test_imports_stand_at_the_top(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    inside = [node for top in tree.body for node in ast.walk(top) if node is not top]
    assert not [node.lineno for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", sorted(PACKAGE.parent.glob("[a-z]*/*.py")), ids=lambda path: path.name)
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


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
    "untracked": "phases", "following": "follow", "logged": "metrics", "interrupts": "interrupt",
    "template": "optimizer_state", "suitable": "inside_a_step", "readings": "trainer", "given": "cache",
    "saving": "cache", "passes": "cache", "obstacles": "frontier",
}  # fmt: skip


@pytest.mark.parametrize("name", FLOORS)
def test_every_file_has_its_tests(name):
    assert (PACKAGE.parent / "tests" / f"test_{TESTED_IN.get(name, name)}.py").exists()
    assert name not in TESTED_IN or not (PACKAGE.parent / "tests" / f"test_{name}.py").exists()
