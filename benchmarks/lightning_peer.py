"""A frozen backbone under a head as Lightning trains it, with its `BackboneFinetuning`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cases import Case

NEVER = 10**9  # the epoch in which the backbone would be unfrozen


class Frozen(BackboneFinetuning):
    """Freezes the backbone for good, its batch normalization too, which `BackboneFinetuning` leaves to train."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=NEVER)

    def freeze_before_training(self, pl_module: lightning.LightningModule) -> None:
        """Freeze what Lightning freezes, and its batch normalization."""
        self.freeze(pl_module.backbone, train_bn=False)


class Classifier(lightning.LightningModule):
    """A backbone and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.total, self.steps = torch.zeros(()), 0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss of a batch."""
        del number
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)).float(), y)
        self.total, self.steps = self.total.to(loss.device) + loss.detach(), self.steps + 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what trains when it begins."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-4)


def make_arm(
    case: Case, backbone: nn.Module, head: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[int], float]:
    """Return what goes through so many batches, and returns their mean loss."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    module, batch = Classifier(backbone, head), case.group.batch

    def run(steps: int) -> float:
        trainer = lightning.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Frozen()], devices=1, num_sanity_val_steps=0,
            precision="bf16-mixed" if case.group.dtype == "bfloat16" else "32-true",
        )  # fmt: skip
        module.total, module.steps = torch.zeros(()), 0
        loader = DataLoader(TensorDataset(x[: steps * batch], y[: steps * batch]), batch)
        trainer.fit(module, loader)
        return float(module.total) / module.steps

    return run
