"""What is measured: workloads, selections, arms, and the suites that combine them. Nothing here imports TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ARMS = {
    "forward": "inference alone: the floor",
    "full": "by hand, full backprop",
    "subset": "by hand, default tape, sources named, all in training mode",
    "selective": "by hand, what trains is watched, batch statistics of the rest stay",
    "tapeloop": "tapeloop's trainer",
    "tapeloop+cache": "the same with `feature_cache`: what is frozen and comes first was computed before",
    "keras": "Keras' `fit`, frozen by flags",
    "torch": "PyTorch, `requires_grad_(False)`",
    "lightning": "Lightning's `BackboneFinetuning`",
}
CACHED = "tapeloop+cache"
FROZEN_FIRST = ("head", "last_block")  # selections before which something is frozen, beside those of an unfreezing
PEERS = ("torch", "lightning")
PEERS_HAVE = {"mlp": ("all", "head"), "resnet50": ("all", "head"), "encoder": ("all", "head", "adapters")}

# Phases of a gradual unfreezing of a MobileNetV2: the head, then one stage more of the backbone in each.
UNFREEZE = ("head", *(f"unfreeze-{depth}" for depth in range(2, 8)))

SELECTIONS = {
    "mlp": ("all", "head", "last_block", "first_block", "biases", "middle"),
    "mobilenetv2": ("all", *UNFREEZE, "last_block", "first_block", "biases", "norm", "middle"),
    "resnet50": ("all", "head", "last_block", "first_block", "biases", "norm", "middle"),
    "efficientnetv2b0": ("all", "head", "last_block", "norm"),
    "vit": ("all", "head", "last_block", "first_block", "biases", "norm", "lora", "adapters", "middle"),
    "encoder": ("all", "head", "last_block", "first_block", "biases", "norm", "lora", "adapters", "middle"),
    "lstm": ("all", "head", "last_block", "middle"),
    "gan": ("all",),
}
NOT_FOR_GAN = ("forward", "keras")  # a pair of models has no one forward pass, and no `fit`
ADDED = ("lora", "adapters")  # selections of weights that the workload alone has not
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Group:
    """What all arms of one comparison share.

    Attributes:
        workload: The model and its data.
        selection: What trains.
        batch: Examples in a batch.
        size: Pixels of a side, or tokens, as the workload says; 0 for those that have neither.
        width: By what the workload's width is multiplied.
        dtype: In what is computed.
        xla: Whether XLA compiles the step.
        steps: Steps in a round.
        rounds: Rounds that are timed.
        model: A user's own model as `package.module:function`, where it is no workload of ours.
    """

    workload: str
    selection: str
    batch: int
    size: int = 0
    width: float = 1.0
    dtype: str = "float32"
    xla: bool = False
    steps: int = 5
    rounds: int = 7
    model: str = ""

    def __str__(self) -> str:
        said = [f"{self.workload} {self.selection}", f"batch {self.batch}"]
        said += [f"size {self.size}"] * bool(self.size) + [f"width {self.width:g}"] * (self.width != 1)
        return ", ".join([*said, *[self.dtype] * (self.dtype != "float32"), *["XLA"] * self.xla])

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from another, in one run or in two: all but how long it is measured."""
        return dataclasses.astuple(dataclasses.replace(self, steps=0, rounds=0))


@dataclass(frozen=True)
class Case:
    """One arm of a group: one process.

    Attributes:
        group: What it shares with the other arms.
        arm: Which arm it is.
    """

    group: Group
    arm: str


# Pixels or tokens, examples and steps in a round, by suite.
SIZES = {
    "quick": {"mlp": (0, 64, 500), "mobilenetv2": (64, 8, 16), "encoder": (32, 4, 10)},
    "cpu": {
        "mlp": (0, 64, 1000),
        "mobilenetv2": (96, 16, 20),
        "resnet50": (96, 16, 8),
        "efficientnetv2b0": (96, 16, 12),
        "vit": (64, 16, 12),
        "encoder": (64, 16, 8),
        "lstm": (32, 32, 20),
        "gan": (32, 32, 20),
    },
    "gpu": {
        "mlp": (0, 64, 2000),
        "mobilenetv2": (224, 64, 20),
        "resnet50": (224, 64, 20),
        "efficientnetv2b0": (224, 64, 20),
        "vit": (224, 64, 20),
        "encoder": (512, 32, 20),
        "lstm": (128, 128, 20),
        "gan": (64, 128, 50),
    },
}
CHOSEN = {
    "quick": {"mlp": ("all",), "mobilenetv2": ("head",), "encoder": ("lora",)},
    "cpu": {
        "mlp": ("all", "first_block"),
        "mobilenetv2": ("head", "last_block", "biases", "middle"),
        "resnet50": ("head",),
        "efficientnetv2b0": ("head",),
        "vit": ("norm",),
        "encoder": ("lora",),
        "lstm": ("middle",),
        "gan": ("all",),
    },
    "gpu": {
        workload: tuple(selection for selection in selections if not selection.startswith("unfreeze"))
        for workload, selections in SELECTIONS.items()
    },
}
SCALED_ARMS = ("forward", "full", "tapeloop")
OWN_MODEL_ARMS = ("forward", "full", "subset", "selective", "tapeloop", "tapeloop+cache", "keras")
ROUNDS = {"quick": 5, "cpu": 5, "gpu": 11}


def suite(name: str) -> list[tuple[Group, tuple[str, ...] | None]]:
    """Return the groups of a suite, each with the arms that it is limited to, or None for all."""
    groups: list[tuple[Group, tuple[str, ...] | None]] = []
    rounds = ROUNDS[name]
    for workload, selections in CHOSEN[name].items():
        size, batch, steps = SIZES[name][workload]
        base = Group(workload, "", batch, size, steps=steps, rounds=rounds)
        groups += [(dataclasses.replace(base, selection=selection), None) for selection in selections]
    there = {group.key for group, _ in groups}
    scaled = [(group, arms) for group, arms in _scaled(name, groups[0][0], rounds) if group.key not in there]
    return groups + scaled + _variants(name, groups)


def _scaled(name: str, mlp: Group, rounds: int) -> Iterator[tuple[Group, tuple[str, ...]]]:
    """Give the groups that differ in batch size, in depth unfrozen, and in width, with the arms that show it."""
    size, batch, steps = SIZES[name]["mobilenetv2"]
    quick = name == "quick"
    base = Group("mobilenetv2", "head", batch, size, steps=steps, rounds=rounds)
    for factor in (0.5, 2) if quick else (0.25, 4):
        scaled = dataclasses.replace(base, batch=int(batch * factor), steps=max(2, int(steps / factor)))
        yield scaled, SCALED_ARMS if name == "gpu" else ("forward", "tapeloop")  # full backprop takes long to trace
    for selection in UNFREEZE[1 :: 1 if name == "gpu" else 2]:
        yield dataclasses.replace(base, selection=selection), ("tapeloop",)
    for width in (4.0, 16.0) if name == "gpu" else (4.0,):
        yield dataclasses.replace(mlp, width=width, steps=max(10, int(mlp.steps / width))), SCALED_ARMS


def _variants(
    name: str, groups: Sequence[tuple[Group, tuple[str, ...] | None]]
) -> list[tuple[Group, tuple[str, ...] | None]]:
    """Return the groups in another precision, and on a GPU compiled by XLA."""
    if name == "quick":
        return []
    on_gpu = {(group.workload, group.selection) for group, _ in groups}
    chosen = on_gpu if name == "gpu" else {("encoder", "lora")}
    plain = [group for group, _ in groups if (group.workload, group.selection) in chosen]
    varied = [dataclasses.replace(group, dtype="bfloat16") for group in plain]
    if name == "gpu":
        varied += [dataclasses.replace(group, xla=True) for group in [*plain, *varied]]
    return [(group, None) for group in varied]


def cases(
    groups: Sequence[tuple[Group, tuple[str, ...] | None]], arms: Sequence[str] | None, workloads: Sequence[str] | None
) -> list[tuple[Group, list[Case]]]:
    """Return the cases to run, by group.

    Args:
        groups: Groups, each with the arms that it is limited to, or None.
        arms: The arms that are asked for; None means all.
        workloads: The workloads that are asked for; None means all.

    Raises:
        ValueError: An arm or a workload is unknown, or nothing is left to run.
    """
    _known("arm", arms, ARMS)
    _known("workload", workloads, SELECTIONS)
    chosen = []
    for group, limited in groups:
        if workloads is None or group.workload in workloads:
            some = [arm for arm in ARMS if arm in (arms or ARMS) and arm in (limited or ARMS) and _is_there(arm, group)]
            if some:
                chosen.append((group, [Case(group, arm) for arm in some]))
    if not chosen:
        raise ValueError(f"Nothing is left to run: no group has the workloads {workloads} and the arms {arms}.")
    return chosen


def _is_there(arm: str, group: Group) -> bool:
    """Tell whether an arm is written for a group."""
    if arm == CACHED:
        return bool(group.model) or group.selection in FROZEN_FIRST or group.selection.startswith("unfreeze")
    if arm in PEERS:
        wanted = ("head",) if arm == "lightning" else PEERS_HAVE.get(group.workload, ())
        return group.selection in wanted and group.workload in PEERS_HAVE and not group.xla
    return group.workload != "gan" or arm not in NOT_FOR_GAN


def _known(what: str, asked: Sequence[str] | None, known: Sequence[str] | dict[str, object]) -> None:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise ValueError(f"There is no {what} {', '.join(map(repr, unknown))}. There are: {', '.join(known)}.")
