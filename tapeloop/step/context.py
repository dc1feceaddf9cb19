"""What is being traced, or run eagerly: the trainer's verbs act on it, and it records what they were asked."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

from tapeloop.errors import PolicyError
from tapeloop.model.selection import Selection
from tapeloop.model.tree import Model, Tree, VariableInfo
from tapeloop.optimization.finite_check import Guard
from tapeloop.optimization.optimizers import Gradients
from tapeloop.optimization.tape import GroupTape
from tapeloop.optimization.target_networks import Pair, move
from tapeloop.optimization.untracked_variables import handles_behind
from tapeloop.optimization.updates import Updates
from tapeloop.step.objective import added_losses


def new_counts(masked: bool) -> tf.Variable:
    """Return a variable in which the loop in the graph keeps how far a run has come.

    `[batches, applied, skipped, consecutive_skipped, step, epoch]`: a `StepCounts`, then the step and the epoch before
    the call of the loop.

    Args:
        masked: Whether steps are masked, and count themselves.
    """
    # Masked steps count where they run. Otherwise the loop looks at the counts before each step, from the host.
    with contextlib.nullcontext() if masked else tf.device("CPU:0"):
        return tf.Variable(tf.zeros(6, tf.int64), trainable=False, name="counts")


class Computed(NamedTuple):
    """What the user's step computes of a batch, or of a piece of one.

    Attributes:
        mean: Tensors that are means over examples: the logs and, if the updates are still to be made, their losses and
            gradients, and the decays of what follows.
        largest: Tensors of which the largest of all pieces counts: values that overwrite a variable.
        checksums: The checksums of the updates that were made already; see `FiniteCheck`.
    """

    mean: dict[str, Any]
    largest: list[Any]
    checksums: tf.Tensor | None


class StepContext:
    """A step of one kind while it is traced, or run eagerly.

    Attributes:
        kind: `"train"`, `"eval"` or `"predict"`; `"build"` while the model's variables are being made.
        selection: What trains.
        numbers: The numbers among the trainer's attributes that the step has read: they become constants.
        assigned: The variables of the model that the user's part itself assigns to.
        used: The identities of the handles of the variables that are used as if they trained.
        examples: How many examples the batch has, of which the step computes.
    """

    def __init__(self, kind: str, selection: Selection, counts: tf.Variable) -> None:
        self.kind = kind
        self.selection = selection
        self.numbers: dict[str, Any] = {}
        self.assigned: set[VariableInfo] = set()
        self.used: set[int] = set()
        self.examples: Any = None
        self._counts = counts

    def step(self) -> tf.Tensor:
        """Return how many steps were trained before this one."""
        counts = self._counts.read_value()
        # An evaluation counts batches too, and trains on none of them.
        return counts[4] + counts[1] if self.kind == "train" else counts[4]

    def epoch(self) -> tf.Tensor:
        """Return how many epochs were trained before this step."""
        return self._counts.read_value()[5]

    def tape(self, groups: Sequence[str], persistent: bool, policy: Any) -> GroupTape:
        """Return a tape that watches the variables of these groups; of all of them, if none is named."""
        known = self.selection.groups
        unknown = [group for group in groups if group not in known]
        if unknown:
            raise PolicyError(
                f"`tape` was asked for the groups {unknown}, but the policy {policy!r} has the groups {list(known)}."
            )
        return GroupTape([variable for group in groups or known for variable in known[group]], persistent)

    def follow(self, pairs: Sequence[Pair], decay: tf.Tensor) -> None:
        """Move variables towards others."""
        move(pairs, decay)

    def added_losses(self) -> list[tf.Tensor]:
        """Return what layers added by `add_loss`, and the weight penalties, of all that trains."""
        return added_losses(self.selection)


class Building(StepContext):
    """The user's step while it is traced only so that the model makes its variables: nothing trains."""

    def __init__(self, model: Model, counts: tf.Variable) -> None:
        self._model = model
        # Nothing is selected yet: the variables that could be are being made.
        super().__init__("build", Selection(Tree((), ()), {}, (), (), (), {}), counts)

    def tape(self, groups: Sequence[str], persistent: bool, policy: Any) -> GroupTape:
        """Return a tape that watches nothing: what trains is not known yet."""
        return GroupTape((), persistent)

    def gradients(self, tape: GroupTape, loss: tf.Tensor, *, allow_unconnected: bool = False) -> Gradients:
        """Return zeros for all that can train."""
        # For all, since a step may look up the gradient of any path, to change it before it applies it.
        return [(tf.zeros(v.shape, v.dtype), v) for v in Tree.of(self._model).variables if v.trainable]

    def update(self, gradients: Gradients, loss: tf.Tensor | None = None) -> None:
        """Update nothing."""

    def added_losses(self) -> list[tf.Tensor]:
        """Return nothing: the loss is not looked at."""
        return []

    def trainable(self, gradients: Any) -> Gradients:
        """Return nothing: the gradients are not looked at."""
        return []


@dataclass
class PendingUpdate:
    """One `update` or `apply` of a step.

    Attributes:
        variables: What it updates.
        in_control_flow: Whether it stands in a branch or a loop of the traced step.
        gradients: Its gradients, if it is deferred.
        overwrites: The new values of variables that are overwritten, likewise.
        loss: Its loss, if there is one, likewise.
        bytes_sent: How many bytes each of several devices gives for it.
    """

    variables: list[VariableInfo]
    in_control_flow: bool
    gradients: list[tf.Tensor] = field(default_factory=list)
    overwrites: list[tf.Tensor] = field(default_factory=list)
    loss: list[tf.Tensor] = field(default_factory=list)
    bytes_sent: int = 0

    def paired(self, gradients: Sequence[tf.Tensor], overwrites: Sequence[tf.Tensor]) -> Gradients:
        """Pair what was averaged over the pieces with the variables, in their order."""
        kinds = {False: iter(gradients), True: iter(overwrites)}
        return [(next(kinds[variable.is_overwritten]), variable) for variable in self.variables]


class PendingFollow(NamedTuple):
    """A `follow` that waits for the updates of the step.

    Attributes:
        pairs: What moves towards what.
        after: After how many updates of the step it happens.
        decay: How much of each target is kept.
    """

    pairs: Sequence[Pair]
    after: int
    decay: tf.Tensor


class Training(StepContext):
    """A training step. It makes its updates in place, or defers them until the user's part has been computed.

    Attributes:
        deferred: Whether updates are deferred: micro-batches average them first, and a step with one update at its end
            can fail before it.
        guard: What happens to updates if something is not finite; the build decides whether a bad step fails.
        updates: The updates so far.
        follows: The deferred `follow`s so far.
    """

    def __init__(
        self, selection: Selection, counts: tf.Variable, guard: Guard, updates: Updates, deferred: bool
    ) -> None:
        super().__init__("train", selection, counts)
        self.deferred = deferred
        self.guard = guard
        self.updates: list[PendingUpdate] = []
        self.follows: list[PendingFollow] = []
        self._updates = updates
        self._checksums: list[tf.Tensor] = []
        self._graph: Any = None

    def begin(self) -> None:
        """Forget what was recorded: a function may be traced twice, and an eager step computes pieces in turns."""
        self.updates, self.follows, self._checksums = [], [], []
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    @property
    def has_control_flow(self) -> bool:
        """Whether an update stands in a branch or a loop."""
        return any(update.in_control_flow for update in self.updates)

    def gradients(self, tape: GroupTape, loss: tf.Tensor, *, allow_unconnected: bool = False) -> Gradients:
        """Return the gradient of a loss for each variable that the tape watches."""
        gradients = self._updates.gradients(tape, loss, allow_unconnected=allow_unconnected)
        self.used |= handles_behind(loss, tape.start)
        return gradients

    def trainable(self, gradients: Any) -> Gradients:
        """Pair gradients by path with the variables that train."""
        if not isinstance(gradients, Mapping):
            raise TypeError(
                "`apply` takes gradients by the paths of variables, as `gradients` returns them: "
                f'`{{"head/kernel": gradient}}`. Received: {gradients!r}.'
            )
        trained = self.selection.trained
        # A tied variable has several paths, and may be named by any.
        by_path = {path: variable for variable in trained for path in variable.paths}
        unknown = [path for path in gradients if path not in by_path]
        if unknown:
            raise PolicyError(
                f"`apply` was given gradients for {unknown[:5]}, which do not train. What trains is "
                f"{[variable.path for variable in trained[:5]]}{' and so on' * (len(trained) > 5)}."
            )
        named = [by_path[path] for path in gradients]
        if len(set(named)) < len(named):
            twice = next(variable for variable in named if named.count(variable) > 1)
            raise ValueError(f"`apply` was given several gradients for one variable, under {twice.paths}. Add them up.")
        for path, gradient in gradients.items():
            shape = getattr(gradient, "shape", None)
            if shape is None or not by_path[path].variable.shape == tuple(shape):
                raise ValueError(
                    f"`apply` takes a tensor of the shape {by_path[path].shape} for `{path}`. Received: {gradient!r}."
                )
        return [(tf.convert_to_tensor(gradient), by_path[path]) for path, gradient in gradients.items()]

    def update(self, gradients: Gradients, loss: tf.Tensor | None = None) -> None:
        """Update variables by their gradients: now, or, if updates are deferred, at the end of the step."""
        # Noted whether or not it is deferred: the plan must know what is updated, and in which order.
        in_control_flow = self._is_in_control_flow()
        update = PendingUpdate([variable for _, variable in gradients], in_control_flow)
        self.updates.append(update)
        if not self.deferred:
            # The optimizer assigns through the same methods as the user. In place, for `frozen` adds to this set.
            noted = set(self.assigned)
            self._apply(update, gradients, loss, self._checksums)
            self.assigned &= noted
            return
        # A tensor of a branch cannot leave it.
        if in_control_flow:
            raise _cannot_be_deferred("update")
        update.gradients = [gradient for gradient, variable in gradients if not variable.is_overwritten]
        update.overwrites = [gradient for gradient, variable in gradients if variable.is_overwritten]
        # A list, for the sums over pieces have a place for each tensor, and none for what is missing.
        update.loss = [] if loss is None else [tf.cast(loss, tf.float32)]

    def follow(self, pairs: Sequence[Pair], decay: tf.Tensor) -> None:
        """Move variables towards others: now, or, if updates are deferred, after those that come before it."""
        # What is deferred must be moved behind the updates that come before it in the user's step.
        if not self.deferred:
            move(pairs, decay)
        elif self._is_in_control_flow():
            raise _cannot_be_deferred("follow")
        else:
            self.follows.append(PendingFollow(pairs, len(self.updates), decay))

    def computed(self, logs: Mapping[str, Any]) -> Computed:
        """Return what the user's part computes: with what the deferred updates need, or how the others ended."""
        if not self.deferred:
            return Computed({"logs": dict(logs)}, [], self._total(self._checksums))
        # A decay is the same for each piece, but may be a tensor of the graph of the user's part, which it can leave
        # only among the outputs.
        mean = {
            "logs": dict(logs),
            "losses": [update.loss for update in self.updates],
            "gradients": [update.gradients for update in self.updates],
            "decays": [follow.decay for follow in self.follows],
        }
        return Computed(mean, [update.overwrites for update in self.updates], None)

    def make_deferred(self, computed: Computed) -> tf.Tensor | None:
        """Make the updates that were deferred, in their order, and move what follows them; return their checksums."""
        checksums: list[tf.Tensor] = []
        self._move_followers(0, computed)
        parts = zip(self.updates, computed.mean["losses"], computed.mean["gradients"], computed.largest)
        for number, (update, loss, gradients, overwrites) in enumerate(parts, 1):
            pairs = update.paired(gradients, overwrites)
            self._apply(update, pairs, loss[0] if loss else None, checksums)
            self._move_followers(number, computed)
        return self._total(checksums)

    def _apply(
        self, update: PendingUpdate, gradients: Gradients, loss: tf.Tensor | None, checksums: list[tf.Tensor]
    ) -> None:
        """Make an update, unless something in it, or in an update before it, is not finite."""
        # First of all: what is looked at, clipped and applied is the update of the whole batch, on every device.
        gradients, loss = self._updates.averaged(gradients, loss, self.examples)
        if self._updates.reduction is not None:
            update.bytes_sent = self._updates.reduction.update_bytes
        check = self.guard.check
        if check is not None:
            found = check.checksums(loss, gradients)
            # A tensor of a branch cannot leave it, but a variable can be added to inside it.
            if update.in_control_flow:
                with self.guard.keeping_count():
                    check.kept.assign_add(found)
            else:
                checksums.append(found)
        self.guard.update(self._total(checksums), lambda: self._updates.make(self.selection, gradients))

    def _total(self, checksums: list[tf.Tensor]) -> tf.Tensor | None:
        check = self.guard.check
        return None if check is None else check.total(checksums, self.has_control_flow)

    def _move_followers(self, number: int, computed: Computed) -> None:
        for follow, decay in zip(self.follows, computed.mean["decays"]):
            if follow.after == number:
                move(follow.pairs, decay)

    def _is_in_control_flow(self) -> bool:
        """Tell whether what is traced now stands in a branch or a loop of the user's step."""
        # The body of a `tf.cond`, a `tf.while_loop` or an AutoGraph `if` is traced into a graph of its own.
        return self._graph is not None and tf.compat.v1.get_default_graph() is not self._graph


def outside(verb: str) -> RuntimeError:
    """Return the error of a verb that was called outside of a step that trains."""
    return RuntimeError(
        f"`{verb}` was called outside a step that trains. It belongs in `train_step`, which `fit` compiles and runs."
    )


def _cannot_be_deferred(verb: str) -> RuntimeError:
    return RuntimeError(
        f"`{verb}` in a branch or a loop of the traced step cannot wait for the other micro-batches. Set "
        "`microbatches=1`, or move it out of the `if`, the `while` or the `tf.cond`."
    )
