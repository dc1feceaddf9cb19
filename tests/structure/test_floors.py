"""The floors of the house, the sizes of files and functions, and where private names may stand."""

import ast
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "tapeloop"
# From the ground up: a folder imports only folders below it. Names on one floor do not import each other.
FLOORS = (
    ("errors", "_validation", "_search", "_digest", "_table", "_version", "_keras_names"),
    ("_backend",),
    ("data",),
    ("model",),
    ("distribution",),
    ("plots", "policies", "optimization"),
    ("step",),
    ("folding",),
    ("loop",),
    ("callbacks", "checkpoint", "feature_cache", "tuning", "dry_run", "inspection"),
    ("fitting",),
    ("trainer",),
    ("learning_rate_search",),
    ("_public",),
    ("cli",),
    ("__init__", "__main__"),
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(PACKAGE.rglob("*.py"))
BY_PATH = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room(path):
    """The folder of a file of the package, or the file itself where it stands at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tapeloop":
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tapeloop."):
            yield node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("tapeloop")]


def test_every_file_has_a_floor():
    assert {room(path) for path in FILES} == set(HEIGHT)


@BY_PATH
def test_a_file_imports_from_lower_floors_only(path):
    for name, *_ in imported_modules(path):
        assert name == room(path) or HEIGHT[name] < HEIGHT[room(path)], f"{path} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {".".join(parts) for parts in imported_modules(path)}
        for path in FILES
    }
    done = set()

    def visit(name, above):
        assert name not in above, f"{' -> '.join((*above, name))}"
        if name in done:
            return
        for below in graph.get(name, ()):
            visit(below, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@BY_PATH
def test_imports_stand_at_the_top(path):
    # What type checkers alone import stands in an `if` at the top.
    body = ast.parse(path.read_text()).body
    tops = [n for top in body for n in (top.body if ast.unparse(top).startswith("if TYPE_CHECKING:") else [top])]
    inside = [node for top in tops for node in ast.walk(top) if node is not top]
    assert not [node.lineno for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_the_design_shows_the_same_floors():
    document = (ROOT / "docs" / "design.md").read_text()
    tree = re.search(r"```\ntapeloop/\n(.*?)```", document, re.DOTALL)[1]
    shown = [
        re.findall(r"\w+(?=/|\.py)", line.split("  ")[1] if line.startswith("  ") else line)
        for line in tree.splitlines()
    ]
    assert [set(names) for names in shown] == [set(floor) for floor in reversed(FLOORS)]


SOURCES = [
    *FILES,
    *itertools.chain.from_iterable((ROOT / d).rglob("*.py") for d in ("tests", "benchmarks", "examples")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


def test_no_folder_has_more_than_a_dozen_files_or_so():
    folders = {path.parent for path in FILES}
    assert all(len(list(folder.glob("*.py"))) <= 14 for folder in folders)  # `__init__.py` among them


@BY_PATH
def test_no_function_is_longer_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            said = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert node.end_lineno - node.lineno - said <= 60, f"{node.name} in line {node.lineno}"


# What users make with options, each of which they pass by its name.
WITH_MORE_OPTIONS = {"Trainer", "RandomSubset"}


@BY_PATH
def test_a_constructor_takes_five_arguments_at_most(path):
    for kind in ast.walk(ast.parse(path.read_text())):
        if isinstance(kind, ast.ClassDef) and kind.name not in WITH_MORE_OPTIONS:
            made = next((node for node in kind.body if getattr(node, "name", None) == "__init__"), None)
            arguments = [] if made is None else [*made.args.args, *made.args.kwonlyargs]
            assert len(arguments) <= 6, f"line {kind.lineno}: {[argument.arg for argument in arguments]}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "_backend"], ids=lambda path: path.stem)
def test_private_names_of_keras_and_tensorflow_are_used_in_the_backend_alone(path):
    source = path.read_text()
    assert "keras.src" not in source
    assert "tensorflow.python" not in source
    assert not re.search(r"\.handle\b|\.captured_inputs|\.control_outputs|\.capture\(|in str\((error|failure)", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            assert (isinstance(owner, ast.Name) and owner.id in ("self", "other")) or node.attr in (
                "_children",
                "_key",
                "_contents",
            ), f"line {node.lineno} uses {node.attr}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_benchmarks_and_examples_use_public_names_alone(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "from tapeloop." not in path.read_text(), path


def test_the_tests_mirror_the_folders_and_import_no_test():
    folders = {path.name.removeprefix("_") for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= {path.name for path in (ROOT / "tests").iterdir()}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^(from|import) tests\.(?!support)", path.read_text(), re.MULTILINE), path
