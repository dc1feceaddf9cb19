"""The commands, and what they can be given. Each hands over to a file that is imported when it is needed."""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tapeloop._version import __version__
from tapeloop.cli import benchmarks, checkpoints
from tapeloop.cli import launch as launching
from tapeloop.cli.answer import Answer, BadUsage
from tapeloop.cli.references import error_line
from tapeloop.errors import TapeloopError

app = typer.Typer(
    name="tapeloop", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
saved = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, verify and show checkpoints.")
app.add_typer(saved, name="checkpoints")

MODEL = "`package.module:name` or `file.py:name` of a model, or of a function that makes one and takes no arguments."
POLICY = 'What trains: a policy in tapeloop\'s names, such as `Freeze("backbone")`, or the `module:name` of one.'
GLOB = "A path glob, as policies take it; without one, all paths are shown."
SCRIPT = "The path of a script, or with `-m` the name of a module."
DIRECTORY = "The directory of a run, as `fit(checkpoint=...)` was given it, or a single checkpoint."
Model = Annotated[str, typer.Argument(help=MODEL, metavar="MODEL", show_default=False)]
Policy = Annotated[str, typer.Option(help=POLICY)]
Folder = Annotated[pathlib.Path, typer.Argument(help=DIRECTORY, metavar="DIRECTORY", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Print the traceback of an error.")]


@app.callback(invoke_without_command=True)
def tapeloop(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train part of a TensorFlow/Keras 3 model: what trains, what that saves, what a run has saved.

    \b
    tapeloop paths mymodels:make_model
    tapeloop explain mymodels:make_model --policy 'Freeze("backbone")'
    tapeloop frontier mymodels:make_model --policy 'Freeze("backbone")' --data mymodels:make_data
    tapeloop checkpoints list runs/digits

    Exit status: 0 if all is well; 1 if something is wrong with what was asked about, such as a damaged checkpoint; 2
    if it cannot be answered, such as of a model that is not there. The answer goes to the standard output; errors, and
    what your own code prints, go to the standard error.
    """
    if version:
        typer.echo(f"tapeloop {__version__}")
        raise typer.Exit


@app.command()
def paths(
    model: Model,
    glob: Annotated[str | None, typer.Argument(help=GLOB, metavar="GLOB", show_default=False)] = None,
    as_json: Json = False,
    with_traceback: Traceback = False,
) -> None:
    """Show the paths of a model.

    Filters match them. With a glob, what it matches is shown.

    \b
    tapeloop paths mymodels:make_model                 # all that there is
    tapeloop paths mymodels:make_model 'backbone'      # all under it
    tapeloop paths models/resnet.py:model '**/bias'    # every bias

    Exit status 1: the glob matches nothing. The nearest paths are shown.
    """
    _answer(lambda: _models().paths(model, glob), as_json, with_traceback)


@app.command()
def explain(
    model: Model,
    policy: Policy = "TrainAll()",
    optimizer: Annotated[str, typer.Option(help="The optimizer, by Keras' name, whose state is counted.")] = "adam",
    depth: Annotated[int, typer.Option(min=1, help="How many levels of submodels are shown.")] = 3,
    as_json: Json = False,
    with_traceback: Traceback = False,
) -> None:
    """Show what trains, and at what cost.

    For each submodel: whether it trains or is frozen, by which rule, and in which mode it runs.

    \b
    tapeloop explain mymodels:make_model --policy 'Freeze("backbone")'
    tapeloop explain mymodels:make_model --policy 'TrainOnly("**/bias", keras.layers.LayerNormalization)'
    tapeloop explain mymodels:make_model --policy mymodels:POLICY --depth 1

    Exit status 1: the policy does not fit the model.
    """
    _answer(lambda: _models().explain(model, policy, optimizer, depth), as_json, with_traceback)


@app.command()
def frontier(
    model: Model,
    data: Annotated[str, typer.Option(help="The data, named as the model is.", show_default=False)],
    policy: Policy = "TrainAll()",
    loss: Annotated[
        str,
        typer.Option(
            help="Keras' name of a loss, an expression, the `module:name` of a loss, or None for a model that adds its "
            "own. By default squared error or cross-entropy, as the targets' shape says: where a step is cut does not "
            "depend on it."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch, for arrays.")] = 32,
    as_json: Json = False,
    with_traceback: Traceback = False,
) -> None:
    """Show what a feature cache would save.

    A feature cache computes the frozen layers that come first once for each example. The share of a step that it would
    save is measured.

    \b
    tapeloop frontier mymodels:make_model --data mymodels:make_data --policy 'Freeze("backbone")'
    tapeloop frontier mymodels:make_model --data data.py:x_and_y --policy 'TrainOnly("head")' --loss mae

    The step is that of `tapeloop.Trainer`, whatever `train_step` the model itself has.

    Exit status 1: there is nothing to cache. What stands in the way is shown.
    """
    _answer(lambda: _models().frontier(model, policy, data, loss, batch_size), as_json, with_traceback)


@saved.command("list")
def list_checkpoints(directory: Folder, as_json: Json = False, with_traceback: Traceback = False) -> None:
    """List the checkpoints of a run.

    The list says when each checkpoint was written, what trained then, whether it is the newest or the best, and whether
    it is damaged, as far as that shows without reading all of its bytes. No command for checkpoints changes anything in
    the directory, and a run may be writing there.

    \b
    tapeloop checkpoints list runs/digits
    tapeloop checkpoints list runs/digits --json | jq -r '.checkpoints[] | select(.best).path'

    Exit status 1: a checkpoint is damaged, or the directory has none.
    """
    _answer(lambda: checkpoints.listed(directory), as_json, with_traceback)


@saved.command()
def verify(directory: Folder, as_json: Json = False, with_traceback: Traceback = False) -> None:
    """Check every byte of checkpoints.

    Each checkpoint must be as it was written.

    \b
    tapeloop checkpoints verify runs/digits
    tapeloop checkpoints verify runs/digits/000012-step-600

    Exit status 1: a checkpoint is damaged, or the directory has none.
    """
    _answer(lambda: checkpoints.verified(directory), as_json, with_traceback)


@saved.command()
def show(directory: Folder, as_json: Json = False, with_traceback: Traceback = False) -> None:
    """Show how far a run had come.

    That is its step, epoch, phase, logs, optimizers, the state of its policy, and the versions that wrote it.

    \b
    tapeloop checkpoints show runs/digits                      # the newest
    tapeloop checkpoints show runs/digits/000012-step-600

    Exit status 1: the checkpoint is damaged, or the directory has none.
    """
    _answer(lambda: checkpoints.described(directory), as_json, with_traceback)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure what partial training saves.

    This runs `python -m benchmarks` of a checkout, with all arguments, on this device.

    \b
    tapeloop bench --help
    tapeloop bench run --suite quick
    """
    try:
        status = benchmarks.run(context.args)
    except BadUsage as error:
        typer.echo(str(error), err=True)
        status = 2
    raise typer.Exit(status)


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help=SCRIPT, metavar="SCRIPT", show_default=False)],
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="How many workers.", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="What the script is given, options too.", metavar="[ARGUMENTS]...", show_default=False),
    ] = None,
    is_module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as `python -m` does.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to save itself that a worker has when another one has failed.")
    ] = 30,
) -> None:
    """Start a script as several workers on this machine.

    Each is a process of its own with a `TF_CONFIG` of its own, which `tf.distribute.MultiWorkerMirroredStrategy()`
    reads. What they print is joined, each line with the number of its worker before it.

    \b
    tapeloop launch --workers 2 train.py
    tapeloop launch -n 2 train.py --epochs 10 --name 'second try'
    tapeloop launch -n 2 --grace 120 -m mypackage.train --epochs 10

    When a worker fails, the others get SIGTERM, with which `fit(checkpoint=...)` saves itself, and SIGKILL if they have
    not ended after the grace period. Ctrl-C and SIGTERM are passed on to each worker once; a second Ctrl-C kills.
    Processes that a worker has started end with it.

    Exit status: 0 if all workers ended well; otherwise that of the first that failed, 128 and the number of the signal
    if one ended it. 2 also if they cannot be started.
    """
    try:
        command = launching.worker_command(script, arguments or (), is_module=is_module)
        status = launching.launch(command, workers, grace)
    except (BadUsage, OSError) as error:
        typer.echo(str(error) if isinstance(error, BadUsage) else error_line(error), err=True)
        status = 2
    raise typer.Exit(status)


def _models() -> Any:
    # Only now, since it needs TensorFlow. What that has to say while it is imported is of no use here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return importlib.import_module("tapeloop.cli.models")


def _answer(ask: Callable[[], Answer], as_json: bool, with_traceback: bool) -> None:
    """Print what a command finds out, or why it cannot, and end with the exit status that says so."""
    try:
        # What the user's own code prints must not mix with the answer.
        with contextlib.redirect_stdout(sys.stderr):
            answer = ask()
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        else:
            typer.echo(str(error) if isinstance(error, (BadUsage, TapeloopError)) else error_line(error), err=True)
        # What nobody has foreseen must not read as an answer.
        raise typer.Exit(1 if isinstance(error, TapeloopError) else 2) from None
    answer.print(as_json=as_json)
    raise typer.Exit(int(answer.is_wrong))
