"""A frozen backbone under a head as Lightning trains it: one long `fit`, over batches that are on the device."""

from __future__ import annotations

import logging
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.torch_peer import loss_of


class Classifier(lightning.LightningModule):
    """A backbone and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(backbone, head)
        self.was_training = backbone.training

    def on_train_batch_start(self, batch: Any, number: int) -> None:
        """Have a frozen backbone infer, which `fit` has put into training mode."""
        if self.model[0].training != self.was_training:
            self.model[0].train(self.was_training)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss of a batch."""
        return loss_of(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what trains when it begins."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-4)


class Ordered(torch.utils.data.IterableDataset):
    """Batches, as many as are ordered from outside; what has gone through an order says so."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.orders: queue.Queue[int] = queue.Queue()
        self.done: queue.Queue[Any] = queue.Queue()

    def __iter__(self) -> Iterator[Any]:
        while True:
            for number in range(self.orders.get()):
                yield self.batches[number]
            if self.batches[0][0].is_cuda:
                torch.cuda.synchronize()
            self.done.put(None)


def make_arm(
    case: Case, backbone: nn.Module, head: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[int], float]:
    """Return what goes through so many batches of a `fit` that never ends.

    Lightning asks for one batch more than it trains on: a round has as many steps as were ordered, and begins with the
    last of the round before. So the first round is followed by one of a single step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    slices = [slice(number * case.batch, (number + 1) * case.batch) for number in range(case.steps)]
    ordered = Ordered([(x[some], y[some]) for some in slices])
    trainer = lightning.Trainer(
        max_steps=-1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, devices=1, num_sanity_val_steps=0,
        precision="bf16-mixed" if case.dtype == "bfloat16" else "32-true",
    )  # fmt: skip

    def fit() -> None:
        try:
            trainer.fit(Classifier(backbone, head), torch.utils.data.DataLoader(ordered, batch_size=None))
        except BaseException as error:
            ordered.done.put(error)

    thread = threading.Thread(target=fit, daemon=True)

    def run(steps: int) -> float:
        is_first = not thread.is_alive()
        if is_first:
            thread.start()
        for order in [steps, 1] if is_first else [steps]:
            ordered.orders.put(order)
            error = ordered.done.get()
            if error is not None:
                raise error
        return 0.0

    return run
