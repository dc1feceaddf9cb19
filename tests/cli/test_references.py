"""Models and policies that cannot be had, each told in a line."""

import sys

import pytest

from tapeloop.cli import references
from tests.support.commands import HERE, ask


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with modules, some of which cannot be imported; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "beside.py").write_text("WIDTH = 2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside_it.py").write_text("WIDTH = 3\n")
    model = "import keras\nmodel = keras.Sequential([keras.Input((3,)), keras.layers.Dense(WIDTH, name='head')])\n"
    (tmp_path / "own.py").write_text(f"from beside import WIDTH\n{model}")
    (tmp_path / "sub" / "own.py").write_text(f"from beside_it import WIDTH\nclass kept:\n    made = 3\n{model}")
    (tmp_path / "imports.py").write_text("import no_such_thing\n")
    (tmp_path / "raises.py").write_text("\nraise RuntimeError('no disk')\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('usage: leaves')\n")
    (tmp_path / "spelled.py").write_text("def model(:\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def test_a_module_of_the_working_directory_and_a_file(folder):
    said = {reference: ask(f"paths {reference} head/bias")[1] for reference in ("own:model", "own.py:model")}
    assert all("(2,)" in text for text in said.values())
    # What a file imports may stand beside it, and another module of its name is another.
    assert "(3,)" in ask("paths sub/own.py:model head/bias")[1]
    assert "(3,)" in ask(f"paths {folder}/sub/own.py:model head/bias")[1]


def test_what_the_users_code_prints_is_no_part_of_the_answer():
    status, said, error = ask(f"paths {HERE}:make_model head/bias --json")
    assert status == 0
    assert said.startswith("{")
    assert error == "the user's own code prints\n"


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (
            "own",
            "MODEL must be `package.module:name` or `file.py:name`, such as `mymodels:make_model`. Received:",
        ),
        ("own:", "Received: 'own:'"),
        ("nowhere:model", "MODEL: there is no module `nowhere`, neither in {folder} nor among the installed packages."),
        ("own.sub:model", "MODEL: there is no module `own.sub`, neither in"),
        ("nowhere.py:model", "MODEL: there is no file nowhere.py."),
        ("imports:model", "MODEL: importing `imports` raised ModuleNotFoundError: No module named 'no_such_thing'"),
        ("imports:model", "(line 1 of {folder}/imports.py)"),
        ("raises:model", "MODEL: importing `raises` raised RuntimeError: no disk (line 2 of {folder}/raises.py)"),
        ("raises.py:model", "MODEL: raises.py raised RuntimeError: no disk (line 2 of {folder}/raises.py)"),
        ("leaves:model", "MODEL: importing `leaves` raised SystemExit: usage: leaves (line 2 of"),
        ("spelled:model", "MODEL: importing `spelled` raised SyntaxError: "),
        ("own:modle", "MODEL: `own` has no `modle`. The nearest names are `model`."),
        ("sub/own.py:kept.maid", "MODEL: `sub/own.py` has no `kept.maid`. The nearest names are `made`."),
        ("own:WIDTH", "MODEL: `own:WIDTH` gives no model. `model` must be a Keras model or layer, a `tf.Module`, or"),
        ("own:WIDTH", "Received: 2 of type int."),
    ],
)
def test_models_that_are_not_there(folder, reference, text):
    status, said, error = ask(f"paths {reference}")
    assert (status, said) == (2, "")
    assert text.format(folder=folder) in error


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("of_width", "`{}:of_width` needs arguments (width, name), and is called without any. Write a function that"),
        ("Wide", "`{}:Wide` needs arguments (width), and is called without any."),
        ("broken", "`{}:broken` raised ValueError: no weights here (line "),
        ("leaves", "`{}:leaves` raised SystemExit: 3 (line "),
        ("MISSING", "`{}:MISSING` gives no model. "),
        ("freeze_body", "Received: Freeze(glob('body')) of type Freeze."),
    ],
)
def test_functions_that_make_no_model(name, text):
    status, said, error = ask(f"explain {HERE}:{name}")
    assert (status, said) == (2, "")
    assert text.format(HERE) in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ('--policy "Freeze("', "--policy: 'Freeze(' raised SyntaxError: "),
        ("--policy \"Freez('body')\"", "`Freez` is no name of tapeloop's, `keras` or Python's. Did you mean `Freeze`?"),
        ('--policy "Freeze(3)"', "--policy: 'Freeze(3)' raised TypeError: A filter must be a path glob, a submodel"),
        ("--policy \"'body'\"", '--policy must be a policy such as `Freeze("body")`'.replace("body", "backbone")),
        ("--policy \"'body'\"", "Received: \"'body'\", which gives 'body'."),
        (f'--policy "{HERE}:MISSING"', "which gives None."),
        (f'--policy "{HERE}:nothing"', f"--policy: `{HERE}` has no `nothing`."),
        ("--optimizer adma", "`optimizer` is 'adma', and Keras has none of that name."),
        ("--depth 0", "Invalid value for '--depth'"),
        ("--what", "No such option: --what"),
    ],
)
def test_policies_and_options_that_are_wrong(options, text):
    status, said, error = ask(f"explain {HERE}:MODEL {options}")
    assert (status, said) == (2, "")
    assert text in error


def test_an_expression_may_use_keras_and_python():
    policy = 'TrainOnly(*[f\\"{name}/bias\\" for name in [\\"head\\"]], keras.layers.BatchNormalization)'
    assert ask(f'explain {HERE}:MODEL --policy "{policy}" --json')[0] == 0


def test_a_traceback_is_shown_to_those_who_ask():
    status, said, error = ask(f"explain {HERE}:broken --traceback")
    assert (status, said) == (2, "")
    assert 'raise ValueError("no weights here")' in error
    assert error.endswith("support/commands.py)\n")


def test_an_expression_that_leaves_is_an_error():
    status, said, error = ask(f'explain {HERE}:MODEL --policy "exit()"')
    assert (status, said, error) == (2, "", "--policy: 'exit()' raised SystemExit: None\n")


OWN = """\
class Kept:
    asked = 0

    @property
    def model(self):
        Kept.asked += 1
        raise RuntimeError(f"asked {Kept.asked} times")

    @property
    def other(self):
        return self.nothing

kept = Kept()
"""


def test_a_property_is_read_once_and_what_it_raises_is_told(folder):
    (folder / "properties.py").write_text(OWN)
    error = ask("paths properties.py:kept.model")[2]
    where = f"(line 7 of {folder}/properties.py)"
    assert error == f"MODEL: `properties.py:kept.model` raised RuntimeError: asked 1 times {where}\n"
    error = ask("paths properties.py:kept.other")[2]
    assert error.startswith("MODEL: `properties.py:kept.other` raised AttributeError: 'Kept' object has no attribute")
    assert error.endswith(f"(line 11 of {folder}/properties.py)\n")


def test_a_folder_whose_name_begins_like_that_of_a_package_is_the_users(folder, monkeypatch):
    monkeypatch.setattr(references, "_PYTHONS", (str(folder / "rai"),))
    assert f"(line 2 of {folder}/raises.py)" in ask("paths raises.py:model")[2]


def test_files_of_one_name_are_modules_of_their_own(folder):
    for place in "abc":
        (folder / place).mkdir()
        (folder / place / "alike.py").write_text("class Kept:\n    pass\n")
    kinds = [
        references.object_at("MODEL", f"{folder}/{place}/alike.py:Kept", lambda found: isinstance(found, type))
        for place in "abc"
    ]
    assert [sys.modules[kind.__module__].Kept for kind in kinds] == kinds
