"""What is built of the package: a wheel that holds it whole and nothing else, and an sdist to build that from."""

import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile

import pytest

import tapeloop as tl
from tests.support.examples import ROOT

pytestmark = pytest.mark.slow
FIT = """
import keras, numpy as np, tapeloop as tl
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="base"), keras.layers.Dense(2, name="head")])
trainer = tl.Trainer(model, tl.Freeze("base"), loss="mse")
trainer.fit((np.ones((8, 4)), np.ones((8, 2))), batch_size=4)
print(tl.__file__, trainer.step)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and an sdist, made with the backend that is installed, and so without a network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    # Not from the checkout: Python would take a folder `build` in it for the module.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"tapeloop-{tl.__version__}-py3-none-any.whl"
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def distribution(unpacked):
    return importlib.metadata.Distribution.at(unpacked / f"tapeloop-{tl.__version__}.dist-info")


def test_the_wheel_holds_the_package_whole_and_nothing_else(unpacked):
    sources = {path for path in (ROOT / "tapeloop").rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in held if path.parts[0] == "tapeloop"} == {path.relative_to(ROOT) for path in sources}
    assert {path.parts[0] for path in held} == {"tapeloop", f"tapeloop-{tl.__version__}.dist-info"}


def test_its_metadata_say_what_it_is_and_what_it_needs(distribution):
    metadata = distribution.metadata
    assert (metadata["Name"], metadata["Version"]) == ("tapeloop", tl.__version__)
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    needed = [required for required in distribution.requires if "extra ==" not in required]
    assert {required.split(">=")[0] for required in needed} == {"tensorflow", "keras", "numpy", "h5py", "tqdm"}


def test_its_command_exists(distribution):
    (command,) = distribution.entry_points
    assert (command.group, command.name) == ("console_scripts", "tapeloop")
    module, _, function = command.value.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_it_runs(unpacked, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{FIT}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.stdout.split() == [str(unpacked / "tapeloop" / "__init__.py"), "2"], result.stderr[-3000:]


def test_the_sdist_holds_what_a_developer_needs_and_nothing_that_was_made(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "mkdocs.yml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "tapeloop/py.typed"}
    wanted |= {"tests/conftest.py", "examples/transfer_digits.py", "docs/design.md", "benchmarks/__main__.py"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".pyc") or "cache__" in name]
    tops = {name.split("/")[0] for name in names}
    assert tops - wanted - {"PKG-INFO", ".gitignore"} == {"tapeloop", "tests", "examples", "docs", "benchmarks"}
