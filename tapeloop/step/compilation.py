"""How what the user writes becomes a step: compiled by TensorFlow, by XLA too, or run as it is."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf


@dataclass(frozen=True)
class Compilation:
    """How a body becomes a step.

    Attributes:
        autograph: Whether AutoGraph converts the body.
        jit_compile: Whether XLA compiles it; with `"auto"`, where there is a GPU and XLA can.
        run_eagerly: Whether it is not compiled at all, but run op by op.
        steps_per_call: How many steps a call of the compiled loop runs, or `"auto"`.
    """

    autograph: bool
    jit_compile: bool | str = False
    run_eagerly: bool = False
    steps_per_call: int | str = "auto"

    def __post_init__(self) -> None:
        if self.jit_compile not in (True, False, "auto"):
            raise ValueError(f"`jit_compile` must be True, False or 'auto'. Received: {self.jit_compile!r}.")
        if not isinstance(self.run_eagerly, bool):
            raise ValueError(f"`run_eagerly` must be True or False. Received: {self.run_eagerly!r}.")
        if self.run_eagerly and self.jit_compile is True:
            raise ValueError(
                "`run_eagerly=True` runs op by op, and `jit_compile=True` compiles. Received both: leave one out."
            )

    @property
    def uses_xla(self) -> bool:
        """Whether XLA is to be tried."""
        return bool(self.jit_compile) and (self.jit_compile is True or bool(tf.config.list_physical_devices("GPU")))
