"""What a trainer shows of itself: a table, a map, and a few lines."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence

import keras

from tapeloop._table import Table, format_count
from tapeloop._validation import whole_number
from tapeloop.errors import PolicyError
from tapeloop.loop.epochs import EpochLoop
from tapeloop.loop.state import TrainerState
from tapeloop.model import summary
from tapeloop.model.selection import Selection
from tapeloop.model.summary import size_of
from tapeloop.model.tree import Model, Tree
from tapeloop.plots.drawing import Figure
from tapeloop.plots.model_map import plot_model
from tapeloop.policies.recorded import described
from tapeloop.step.plan import StepParts

MOST_GROUPS = 6  # that a line names
LONGEST = 110  # characters of a line


class ShowsItself:
    """The methods of a trainer that say what trains."""

    model: Model
    state: TrainerState
    _loop: EpochLoop
    _parts: StepParts

    @property
    def selection(self) -> Selection:
        """What trains, by the policy and the model as they are now.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> [variable.path for variable in tl.Trainer(model, tl.Freeze("base")).selection.trained]
            ['head/kernel', 'head/bias']
        """
        # Within an epoch the policy is not asked: one that keeps state would move on.
        return self._loop.phases.held(trains=True) if self._loop.runs else self._loop.phases.now()

    def explain(self, depth: int = 3) -> Table:
        """Return a table of what trains, what is frozen, by which rule, in which mode and at what cost.

        Submodels that follow one another, look alike and differ in a number of their names are in one row, such as
        `blocks/0..11`: its numbers are those of each, with how many there are. A notebook shows the table as HTML.

        Args:
            depth: The number of levels of submodels shown; below the first, only if they differ inside.

        Raises:
            PolicyError: The policy cannot be resolved for the model.
            ValueError: `depth` is no whole number of 1 or more.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> print(tl.Trainer(model, tl.Freeze("base")).explain().splitlines()[2])
            base              15  -        frozen  Freeze: glob('base')  inference              0 B
        """
        selection = self.selection
        optimizers = self.state.optimizers
        optimizers.require_groups([selection], changing=True)
        return summary.explain(selection, functools.partial(optimizers.expected_bytes, selection), depth)

    def plot(self, path: str | os.PathLike[str] | None = None, *, depth: int | None = None) -> Figure:
        """Draw the model as a map of what trains.

        Areas are parameters, in the order of the model, and colours are groups. What is frozen is grey and hatched,
        what Keras holds non-trainable a lighter grey; a dashed line surrounds what runs in inference mode. Layers whose
        names begin alike, such as `block_1_conv` and `block_1_bn`, are drawn as one block, and repeated submodels as
        one. The legend has the numbers. How training went is drawn by `trainer.history.plot()`.

        Args:
            path: Where the picture is written: a file that ends in .png or .svg.
            depth: The number of levels of submodels drawn; by default all.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            PolicyError: The policy cannot be resolved for the model.
            ValueError: `path` has another suffix or no folder, or `depth` is no whole number of 1 or more.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
            >>> figure = tl.Trainer(model, tl.Freeze("base")).plot()
            >>> [text.get_text() for text in figure.legends[0].get_texts()]
            ['trains, group default: 8 (34.8%)', 'frozen: 15 (65.2%)', 'in inference mode: 15 (65.2%)']
        """
        levels = math.inf if depth is None else whole_number("depth", depth, 1)
        selection = self.selection
        title = f"{_sized(self.model, selection)}\n{described(self._parts.policy)}"
        return plot_model(selection, title, path, levels)

    def __repr__(self) -> str:
        """Say in a few lines what it trains and how far it has come. The policy is not asked anew."""
        if "_parts" not in vars(self):  # a debugger shows objects that are half made
            return f"<{type(self).__name__}, not initialised>"
        # Found once for all lines; each line that cannot be told says why, and the others are told.
        found: list[Selection] = []
        trains = _told(lambda: self._trains(found))
        selection = found[0] if found else None
        lines = {
            "policy": _told(lambda: described(self._parts.policy)),
            "trains": trains,
            "optimizer": _told(lambda: _listed(self.state.optimizers.settings(selection))),
            "trained": _told(
                lambda: f"{format_count(self.state.step, 'step')}, {format_count(self.state.epoch, 'epoch')}"
            ),
        }
        first = f"<{type(self).__name__} of {_told(lambda: _sized(self.model, selection))}"
        return "\n".join([first, *(f"  {f'{name}:':<11}{said}" for name, said in lines.items())]) + ">"

    def _trains(self, found: list[Selection]) -> str:
        """Say what trains, as far as that is known, and add the selection to what was found."""
        state, is_under_way = self.state, self._loop.runs or self._parts.context is not None
        try:
            selection = self._loop.phases.known(is_under_way=is_under_way)
        except PolicyError as error:
            if state.step or all(layer.object.built for layer in Tree.of(self.model).layers):
                return f"nothing, since {error}"
            return "not known before the model is built, by its first call"
        if selection is None:
            return "not known before the policy is asked, by the next step"
        found.append(selection)
        total, trained = size_of(selection.tree.variables), size_of(selection.trained)
        groups = _listed([f"{group} {size_of(held):,}" for group, held in selection.groups.items()])
        return f"{trained:,} parameters ({trained / max(1, total):.1%}), by group: {groups}"


def _told(tell: Callable[[], str]) -> str:
    """Return what there is to say, in one line; or why it cannot be said."""
    try:
        said = tell()
    except Exception as error:
        said = f"cannot be told: {type(error).__name__}: {error}"
    said = " ".join(said.split())
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."


def _name(model: Model) -> str:
    """Return what a model is called: `Functional 'resnet50'`."""
    if isinstance(model, Mapping):
        return f"{format_count(len(model), 'model')}: {_listed(list(model))}"
    name = getattr(model, "name", None) if isinstance(model, keras.Layer) else None
    return type(model).__name__ + (f" {name!r}" if name else "")


def _sized(model: Model, selection: Selection | None) -> str:
    tree = Tree.of(model) if selection is None else selection.tree
    return f"{_name(model)}, {size_of(tree.variables):,} parameters"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_GROUPS} more" if len(names) > MOST_GROUPS else ""
    return ", ".join(names[:MOST_GROUPS]) + more
