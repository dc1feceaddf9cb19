"""What is measured: cases, arms, and the suites that combine them. Nothing here imports TensorFlow."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What an arm is: a way to train, and after each `+` what is changed of it. Each is as it comes, or tuned.
ARMS = {
    "forward": ("tuned", "inference alone: the floor"),
    "full": ("tuned", "full backprop, by hand"),
    "subset": ("defaults", "by hand as one begins: default tape, sources named, all in training mode"),
    "hand": ("tuned", "by hand as one ends: what trains is watched, what is frozen infers"),
    "tapeloop": ("defaults", "tapeloop's trainer in a fit of 50 steps or more: the frozen part is folded"),
    "keras": ("defaults", "Keras' `fit`, frozen by flags"),
    "torch": ("defaults", "PyTorch, eager, `requires_grad_(False)`"),
    "lightning": ("defaults", "Lightning, one long `fit` over data that is on the device"),
    "jax": ("tuned", "Keras' model on JAX, a jitted step that reuses its memory, Optax"),
}
CHANGES = {
    "guard": "with a check for Inf and NaN before each update",
    "xla": "compiled by XLA",
    "cache": "what is frozen and comes first was computed before (`feature_cache`)",
    "features": "a head alone, on features that were computed before",
    "plain": "as in a fit of less than 50 steps, `fold_frozen=False`",
    "remat": "activations of blocks are computed again in the backward pass",
    "micro2": "two micro-batches", "micro4": "four micro-batches", "micro8": "eight micro-batches",
    "tuned": "`steps_per_execution=16`", "compile": "`torch.compile`, `channels_last`, fused Adam",
    "metrics": "with a progress bar and three metrics", "dataset": "from a `tf.data.Dataset`",
    "onbatch": "a call for each batch", "epochwise": "an epoch for each step",
    "looks": "with a callback that looks at epochs", "watches": "with a callback that looks at batches",
    "saved": "with a checkpoint every 50 steps",
}  # fmt: skip
# Arms of other frameworks: the module here that measures them, and the packages that they need.
PEERS = {
    "torch": ("torch_peer", ("torch",)), "lightning": ("torch_peer", ("torch", "lightning")),
    "jax": ("jax_peer", ("jax", "jaxlib", "optax")),
}  # fmt: skip
PEERS_HAVE = ("mlp", "resnet50", "encoder", "vit", "vit-b16", "bert-base", "gpt2-small")
FROZEN_FIRST = ("head", "last_block")  # selections before which something is frozen, beside those of an unfreezing
UNFREEZE = ("head", *(f"unfreeze-{depth}" for depth in range(2, 8)))  # phases of an unfreezing of a MobileNetV2
ADDED = ("lora", "adapters")  # selections of weights that the workload alone has not
DTYPES = ("float32", "bfloat16")
_BLOCKS = ("all", "head", "last_block", "first_block", "biases", "norm", "middle")
SELECTIONS = {
    "mlp": ("all", "head", "last_block", "first_block", "biases", "middle"),
    "mobilenetv2": (*_BLOCKS, *UNFREEZE[1:]),
    "resnet50": _BLOCKS,
    **dict.fromkeys(("efficientnetv2b0", "efficientnetv2s"), ("all", "head", "last_block", "norm")),
    "unet": ("all", "head", "last_block", "first_block", "norm"),
    "resnet50-blocks": ("all", "head"),
    **dict.fromkeys(("vit", "encoder", "vit-b16", "bert-base", "gpt2-small"), (*_BLOCKS, *ADDED)),
    "lstm": ("all", "head", "last_block", "middle"),
    "gan": ("all",),
    "digits": ("all", "head"),  # which are learnt until they are known (`accuracy`)
}
KINDS = ("step", "memory", "equivalence", "capacity", "accuracy", "checkpoint")  # functions of `benchmarks/kinds.py`


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    workload: str  # the model and its data
    selection: str  # what trains
    arm: str  # by which way
    batch: int
    size: int = 0  # pixels of a side, or tokens; 0 for workloads that have neither
    width: float = 1.0  # by what the workload's width is multiplied
    dtype: str = "float32"
    steps: int = 20  # of a long round; a short one has a fifth
    rounds: int = 5  # pairs of a short and a long round
    kind: str = "step"  # what is measured: a name of `KINDS`, or `module:generator`
    process: int = 0  # which of several that measure the same
    scale: float = 1.0  # to what part the workload is shrunk, to try things out
    cap_mb: int = 0  # the memory that the device has, in MiB, where it is capped
    own: tuple[tuple[str, str], ...] = ()  # of a user's own model: its options

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """Return the case of a row of results."""
        return cls(**{**row["case"], "own": tuple(map(tuple, row["case"]["own"]))})

    @property
    def base(self) -> str:
        """The way to train, without what is changed of it."""
        return self.arm.split("+")[0]

    @property
    def changes(self) -> tuple[str, ...]:
        """What is changed of it."""
        return tuple(self.arm.split("+")[1:])

    @property
    def group(self) -> Case:
        """What all arms and processes of one comparison share."""
        return dataclasses.replace(self, arm="", kind="", process=0, rounds=0, steps=0)

    def __str__(self) -> str:
        said = [f"{self.workload} {self.selection}", f"batch {self.batch}"]
        said += [f"size {self.size}"] * bool(self.size) + [f"width {self.width:g}"] * (self.width != 1)
        said += [self.dtype] * (self.dtype != "float32") + [f"cap {self.cap_mb} MiB"] * bool(self.cap_mb)
        return ", ".join([*said, *[f"scale {self.scale:g}"] * (self.scale != 1)])


@dataclass(frozen=True)
class Transformer:
    """The measures of a transformer: of images if it has no vocabulary, of the next token if it is causal."""

    width: int
    depth: int
    heads: int
    vocabulary: int = 0
    patch: int = 8
    positions: bool = False
    is_first_normed: bool = False
    is_causal: bool = False

    @classmethod
    def of(cls, case: Case) -> Transformer:
        """Return those of a case: shallow and narrow where it is shrunk."""
        full = TRANSFORMERS[case.workload]
        width = max(full.heads * 4, int(full.width * case.scale) // full.heads * full.heads)
        vocabulary = full.vocabulary and max(100, int(full.vocabulary * case.scale))
        return dataclasses.replace(full, width=width, depth=max(2, int(full.depth * case.scale)), vocabulary=vocabulary)


TRANSFORMERS = {
    "vit": Transformer(192, 6, 4),
    "encoder": Transformer(256, 6, 4, vocabulary=1000),
    "vit-b16": Transformer(768, 12, 12, patch=16, positions=True, is_first_normed=True),
    "bert-base": Transformer(768, 12, 12, 30522, positions=True),
    "gpt2-small": Transformer(768, 12, 12, 50257, positions=True, is_first_normed=True, is_causal=True),
}

# Pixels or tokens, examples, and steps in a long round.
SMALL = {"mlp": (0, 64, 500), "mobilenetv2": (64, 8, 16), "encoder": (32, 4, 10)}
MIDDLE = {
    "mlp": (0, 64, 1000), "mobilenetv2": (96, 16, 20), "efficientnetv2b0": (96, 16, 12), "vit": (64, 16, 12),
    "encoder": (64, 16, 8), "lstm": (32, 32, 20), "gan": (32, 32, 20), "digits": (8, 32, 20),
    **dict.fromkeys(("resnet50", "resnet50-blocks"), (96, 16, 8)),
}  # fmt: skip
LARGE = {
    **dict.fromkeys(("resnet50", "resnet50-blocks", "efficientnetv2b0", "efficientnetv2s"), (224, 64, 20)),
    **dict.fromkeys(("mobilenetv2", "vit-b16"), (224, 64, 20)), "bert-base": (512, 32, 20), "unet": (256, 16, 20),
    "gpt2-small": (512, 16, 20), "mlp": (0, 64, 2000), "lstm": (128, 128, 20), "gan": (64, 128, 50),
    "digits": (8, 32, 20),
}  # fmt: skip
CORE = ("forward", "full", "hand", "tapeloop")
MORE = ("hand+guard", "tapeloop+cache", "tapeloop+plain", "keras", "keras+tuned", "torch", "torch+compile", "lightning",
        "jax")  # fmt: skip
XLA = ("full+xla", "hand+xla", "tapeloop+xla")
SHARED = ("forward", "full", "full+xla")  # arms that do not depend on what trains
ON_GPU = ("resnet50", "efficientnetv2s", "vit-b16", "bert-base", "gpt2-small", "unet")
OWN_ARMS = ("forward", "full", "hand", "hand+guard", "tapeloop", "tapeloop+cache", "keras")


class Plan:
    """A list of cases in the making, each with how soon it is wanted.

    `sizes` are by workload. Arms that are `shared` do not depend on what trains, and are measured once for all
    selections. On a GPU memory is wanted later: it is read beside the times too.
    """

    def __init__(self, sizes: dict[str, Any], shared: Sequence[str] = (), memory_later: int = 0) -> None:
        self._sizes, self._shared, self._later = sizes, shared, {"memory": memory_later}
        self._cases: dict[Case, int] = {}

    def add(
        self, workload: str, selection: str, arms: Sequence[str], *, soon: int = 0, processes: int = 3,
        kinds: Sequence[str] = ("step", "memory"), **changes: Any,
    ) -> None:  # fmt: skip
        """Add the arms of a group that are written for it."""
        size, batch, steps = self._sizes[workload]
        fields = {"batch": batch, "size": size, "steps": steps, **changes}
        for arm, kind in itertools.product(arms, kinds):
            where = "all" if arm in self._shared or (arm.startswith("full") and selection in ADDED) else selection
            for process in range(processes if kind in ("step", "accuracy") else 1):
                case = Case(workload, where, arm, **fields, kind=kind, process=process)
                if is_there(case):
                    self._cases.setdefault(case, soon + self._later.get(kind, 0))

    def check(self, workload: str, selection: str, **changes: Any) -> None:
        """Add a check that the arms of a group compute the same, on a small batch."""
        self.add(workload, selection, ["tapeloop"], kinds=["equivalence"], soon=1, batch=4, steps=2, **changes)

    def limits(self, workload: str, caps: Sequence[int], soon: int, **changes: Any) -> None:
        """Add the largest batch under each cap, and the time to an accuracy."""
        for cap, (selection, arm) in itertools.product(caps, (("all", "full"), ("head", "tapeloop"))):
            self.add(workload, selection, [arm], kinds=["capacity"], cap_mb=cap, soon=soon, batch=1, steps=1, **changes)
        self.add("digits", "all", ["full"], kinds=["accuracy"], soon=soon)
        self.add("digits", "head", ["tapeloop", "tapeloop+cache"], kinds=["accuracy"], soon=soon)

    def ordered(self) -> list[Case]:
        """Return the cases, the most informative first: first processes of what is wanted soon, then the others.

        The arms of a group stand together, in the next process in the reverse order.
        """
        place = {case: number for number, case in enumerate(self._cases)}
        groups = {group: number for number, group in enumerate(dict.fromkeys(case.group for case in place))}

        def rank(case: Case) -> tuple[int, int, str, int]:
            order = -place[case] if case.process % 2 else place[case]
            return self._cases[case] + case.process, groups[case.group], case.kind, order

        return sorted(self._cases, key=rank)


def is_there(case: Case) -> bool:
    """Tell whether an arm is written for a group."""
    if case.workload == "gan":
        return case.base in ("full", "hand", "tapeloop") and not set(case.changes) - {"xla"}
    if case.base in PEERS:
        wanted = {"lightning": ("head",), "jax": ("all", "head"), "torch": ("all", "head", "last_block")}[case.base]
        return case.kind == "step" and case.selection in wanted and case.workload in PEERS_HAVE
    where = {
        "cache": case.selection in FROZEN_FIRST or case.selection.startswith("unfreeze"),
        "plain": case.selection != "all",
        "remat": case.workload == "resnet50-blocks" or "lora" in SELECTIONS.get(case.workload, ()),
    }
    return bool(case.own) or all(where.get(change, True) for change in case.changes)


def quick() -> list[Case]:
    """Three minutes on two cores."""
    plan = Plan(SMALL, shared=SHARED[1:])
    plan.add("mobilenetv2", "head", CORE, processes=1)
    plan.add("mlp", "all", (*CORE, "hand+guard"))
    plan.add("mobilenetv2", "head", ("tapeloop+plain", "keras"), processes=1, soon=1)
    plan.add("encoder", "lora", CORE, processes=1, soon=1)
    plan.add("mlp", "all", ("keras", "keras+tuned", "torch", "torch+compile", "jax"), processes=1, soon=1)
    plan.add("mlp", "head", ("hand", "tapeloop", "torch", "lightning"), processes=1, soon=1, kinds=["step"])
    plan.check("mlp", "all")
    plan.check("mobilenetv2", "head", size=32)
    for batch in (16, 256):
        plan.add("mlp", "all", CORE, batch=batch, processes=1, soon=2)
    return plan.ordered()


def cpu() -> list[Case]:
    """All workloads, about an hour on two cores."""
    plan = Plan(MIDDLE, shared=SHARED[1:])
    for workload, selection in (
        *[("mobilenetv2", selection) for selection in ("head", "last_block", "biases", "middle")], ("resnet50", "head"),
        ("encoder", "lora"), ("efficientnetv2b0", "head"), ("vit", "norm"), ("mlp", "all"), ("mlp", "first_block"),
        ("lstm", "middle"), ("gan", "all"),
    ):  # fmt: skip
        plan.add(workload, selection, CORE)
        plan.add(workload, selection, MORE, soon=1, processes=3 if selection == "head" or workload == "mlp" else 1)
        if workload != "gan":
            plan.check(workload, selection, size=min(MIDDLE[workload][0], 32))
    later: dict[str, Any] = {"soon": 2, "processes": 1}
    plan.add("encoder", "adapters", CORE, **later)
    plan.add("encoder", "all", ("tapeloop", "torch", "torch+compile", "jax"), **later)
    plan.add("encoder", "lora", CORE, dtype="bfloat16", **later)
    plan.add("vit", "norm", XLA, **later)
    plan.add("mlp", "all", XLA, **later)
    plan.add("mlp", "all", CORE, width=4.0, steps=250, soon=2)
    for batch in (4, 64):
        plan.add("mobilenetv2", "head", CORE, batch=batch, steps=320 // batch, **later)
    for selection in UNFREEZE[2::2]:
        plan.add("mobilenetv2", selection, ("tapeloop",), **later)
    plan.limits("mobilenetv2", (512, 1024), soon=3)
    return plan.ordered()


def gpu() -> list[Case]:
    """An hour or less on one large GPU; the first ten minutes give a table of all workloads."""
    plan = Plan(LARGE, shared=SHARED, memory_later=3)
    once: dict[str, Any] = {"processes": 1, "kinds": ["step"]}
    for dtype, names in (("bfloat16", ON_GPU), ("float32", ("resnet50", "bert-base"))):
        for selection, name in itertools.product(("head", "all", "last_block", "lora"), names):
            if selection in SELECTIONS[name]:
                more = {} if selection in ("head", "all") and dtype == "bfloat16" else once
                plan.add(name, selection, CORE, dtype=dtype, soon=int(dtype == "float32"), **more)
                # By default tapeloop is compiled by XLA there: so must be what it is compared with.
                plan.add(name, selection, XLA[:2], dtype=dtype, soon=1, **once)
    once["dtype"] = "bfloat16"
    for name in ON_GPU:
        plan.check(name, "head", size=min(LARGE[name][0], 64))
        plan.add(name, "all", ("tapeloop+remat", "torch+compile"), soon=3, **once)
        plan.add(name, "head", MORE, soon=3, **once)
    for batch, selection in itertools.product((8, 256), ("all", "head")):  # data above 1 GiB is not on the device
        plan.add("resnet50", selection, CORE, batch=batch, steps=min(20, 1280 // batch), soon=3, **once)
    plan.limits("resnet50", (16_384, 24_576, 40_960, 81_920), soon=4, dtype="bfloat16")
    return plan.ordered()


def gpu_full() -> list[Case]:
    """Everything else on a GPU: all selections of all workloads, in both precisions, with XLA and without."""
    plan = Plan({**MIDDLE, **LARGE}, shared=SHARED, memory_later=3)
    for workload, selections in SELECTIONS.items():
        for dtype, selection in itertools.product(DTYPES * (workload != "digits"), selections):
            plan.add(workload, selection, (*CORE, *MORE, *XLA, "subset"), dtype=dtype, processes=1)
    for width in (4.0, 16.0):
        plan.add("mlp", "all", CORE, width=width, soon=1)
    there = set(gpu())
    return [case for case in plan.ordered() if case not in there]


# What single features cost or save, each arm beside what it is judged by: workloads and selections, arms, and what
# differs. Memory is measured where it says so.
_MEMORY_TOO: dict[str, Any] = {"kinds": ("step", "memory")}
FEATURES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "loop": [
        ("mlp all", "tapeloop hand+guard hand keras keras+tuned tapeloop+metrics", {}),
        ("mlp all", "tapeloop+dataset hand+guard+dataset keras+tuned+dataset", {}),
        ("mobilenetv2 head", "forward tapeloop tapeloop+plain", _MEMORY_TOO),
        ("resnet50 head", "forward tapeloop tapeloop+plain torch", _MEMORY_TOO),
        ("efficientnetv2b0 head", "forward tapeloop tapeloop+plain", _MEMORY_TOO),
        ("resnet50 all, encoder adapters", "tapeloop hand+guard", {}),
    ],
    "cache": [("mobilenetv2 head, resnet50 head", "tapeloop tapeloop+cache hand+features", {"steps": 40})],
    "microbatches": [
        ("resnet50-blocks all, encoder all",
         "tapeloop tapeloop+micro2 tapeloop+micro4 tapeloop+micro8 tapeloop+remat",
         {**_MEMORY_TOO, "batch": 64, "steps": 5, "processes": 1}),
    ],
    "on_batch": [("mlp all, mobilenetv2 head", "tapeloop+onbatch keras+onbatch", {})],
    "callbacks": [("mlp all", f"{base} {base}+looks {base}+watches", {}) for base in ("tapeloop", "keras")],
    "edges": [
        ("mlp all, mobilenetv2 head", "tapeloop hand+guard tapeloop+epochwise hand+guard+epochwise", {"rounds": 9}),
    ],
    "checkpoints": [
        ("resnet50 all", "tapeloop tapeloop+saved", {"steps": 100, "rounds": 3, "processes": 1}),
        ("resnet50 all, resnet50 head", "tapeloop", {"kinds": ["checkpoint"], "steps": 2}),
    ],
}  # fmt: skip


def features(name: str) -> list[Case]:
    """What a single feature costs or saves."""
    plan = Plan({**MIDDLE, "mlp": (0, 64, 200)})
    for groups, arms, options in FEATURES[name]:
        for group in groups.split(", "):
            plan.add(*group.split(), arms.split(), **{"kinds": ["step"], **options})
    return plan.ordered()


SUITES = {"quick": quick, "cpu": cpu, "gpu": gpu, "gpu-full": gpu_full}


def suite(name: str, scale: float = 1.0) -> list[Case]:
    """Return the cases of a suite, the most informative first, shrunk to `scale`."""
    cases = SUITES[name]() if name in SUITES else features(name)
    return cases if scale == 1 else list(dict.fromkeys(_shrunk(case, scale) for case in cases))


def _shrunk(case: Case, scale: float) -> Case:
    least = 8 if case.workload in ("encoder", "bert-base", "gpt2-small", "lstm") else 32  # tokens, or pixels
    return dataclasses.replace(
        case,
        batch=case.batch if case.kind == "equivalence" else max(1 if case.cap_mb else 2, int(case.batch * scale)),
        size=max(least, int(case.size * scale) // least * least) if case.size else 0,
        steps=max(min(5, case.steps), int(case.steps * scale)),
        rounds=max(2, int(case.rounds * scale)),
        scale=scale,
        cap_mb=int(case.cap_mb * scale),
    )


def chosen(cases: Sequence[Case], arms: Sequence[str] | None, workloads: Sequence[str] | None) -> list[Case]:
    """Return those cases that have one of the arms and one of the workloads that are asked for; None means all.

    Raises:
        ValueError: An arm or a workload is unknown, or nothing is left.
    """
    for arm in arms or ():
        if arm.split("+")[0] not in ARMS or not set(arm.split("+")[1:]) <= set(CHANGES):
            raise ValueError(f"There is no arm {arm!r}. There are: {', '.join(ARMS)}, with +{', +'.join(CHANGES)}.")
    unknown = [name for name in workloads or () if name not in SELECTIONS]
    if unknown:
        raise ValueError(f"There is no workload {', '.join(map(repr, unknown))}. There are: {', '.join(SELECTIONS)}.")
    left = [c for c in cases if (not arms or c.arm in arms) and (not workloads or c.workload in workloads)]
    if not left:
        raise ValueError(f"Nothing is left to run: no case has the workloads {workloads} and the arms {arms}.")
    return left
