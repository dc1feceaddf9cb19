"""Learning rates that fall with depth."""

from __future__ import annotations

from dataclasses import dataclass

from tapeloop._validation import is_number
from tapeloop.errors import PolicyError
from tapeloop.model.filters import SubmodelKind
from tapeloop.model.tree import VariableInfo
from tapeloop.policies.base import VariablePolicy


@dataclass(frozen=True, init=False, repr=False)
class LayerwiseDecay(VariablePolicy):
    """Train everything, lower blocks slower: each block is a group with its own multiplier of the learning rate.

    Of n blocks, the last has the multiplier `rate`, the first `rate ** n`. The variables before the first block are the
    group `"below"` with `rate ** (n + 1)`; those after the blocks, the head, are the group `"above"` with 1.

    Source: Clark et al., ELECTRA, 2020, appendix B; Bao et al., BEiT, 2021, section 3.1.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(3, name="base"), dense(2, name="head")])
        >>> trainer = tl.Trainer(model, tl.LayerwiseDecay(0.5, of=dense), optimizer=keras.optimizers.SGD(1.0))
        >>> dict(trainer.learning_rates)
        {'block0': 0.25, 'block1': 0.5}
    """

    _rate: float
    _blocks: SubmodelKind

    def __init__(self, rate: float, *, of: type | str) -> None:
        """Set the decay.

        Args:
            rate: The factor from one block to the one below it, above 0 and at most 1.
            of: The blocks: a class of layers, or a path glob that names submodels, as in `"encoder/blocks/*"`.

        Raises:
            TypeError: `of` is no class of layers and no path glob.
            ValueError: `rate` is out of range.
        """
        if not is_number(rate) or not 0 < rate <= 1:
            raise ValueError(f"`rate` must be above 0 and at most 1. Received: {rate!r}.")
        object.__setattr__(self, "_rate", float(rate))
        object.__setattr__(self, "_blocks", SubmodelKind(of))

    def __repr__(self) -> str:
        return f"LayerwiseDecay({self._rate}, of={self._blocks!r})"

    def group(self, variable: VariableInfo) -> str | None:
        blocks = self._blocks.found_in(variable.tree)
        if not blocks:
            raise PolicyError(
                f"{self!r} found no submodel that holds variables that can train. Name the blocks by their class or by "
                f"a path glob; the model has the submodels {[s.path for s in variable.tree.submodels[1:6]]} and so on."
            )
        inside = [index for index, block in enumerate(blocks) if block in variable.submodels]
        if inside:
            # Blocks may stand in blocks, if they are named by class: the innermost counts.
            return f"block{inside[-1]}"
        # Depth is the order of construction: the embedding before the first block is below, the head above.
        order = variable.tree.variables
        is_below = order.index(variable) < order.index(variable.tree.variables_in[blocks[0]][0])
        return "below" if is_below else "above"

    def multiplier(self, variable: VariableInfo) -> float:
        group, blocks = self.group(variable), len(self._blocks.found_in(variable.tree))
        if group is None or group == "above":
            return 1.0
        return self._rate ** (blocks + 1 if group == "below" else blocks - int(group.removeprefix("block")))

    def rule(self, variable: VariableInfo) -> str:
        return f"LayerwiseDecay: x{self.multiplier(variable):.3g}"
