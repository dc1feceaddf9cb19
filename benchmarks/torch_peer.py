"""The same architectures in PyTorch, trained by a plain loop, compiled, or by Lightning: what another framework takes.

A process of its own, as for every arm; nothing else here imports PyTorch. Gradients are not compared: weights are drawn
by another generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from benchmarks import devices
from benchmarks.cases import TRANSFORMERS, Case, Transformer
from benchmarks.measure import rounds


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, with the stride in the first, as Keras' ResNet50 has it."""

    def __init__(self, wide: int, filters: int, stride: int) -> None:
        super().__init__()
        out = 4 * filters
        self.way = nn.Sequential(
            nn.Conv2d(wide, filters, 1, stride), nn.BatchNorm2d(filters), nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(),
            nn.Conv2d(filters, out, 1), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = wide == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(wide, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return torch.relu(self.way(x) + self.shortcut(x))


class Stack(nn.Module):
    """Tokens or patches through the blocks of a transformer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        of = Transformer.of(case)
        width, first = of.width, of.is_first_normed
        self.first = nn.Embedding(of.vocabulary, width) if of.vocabulary else nn.Conv2d(3, width, of.patch, of.patch)
        tokens = case.size if of.vocabulary else (case.size // of.patch) ** 2
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width)) if of.positions else 0.0
        block = nn.TransformerEncoderLayer(
            width, of.heads, 4 * width, 0.0, "gelu", layer_norm_eps=1e-3, batch_first=True, norm_first=first
        )
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(of.depth))
        self.norm = nn.LayerNorm(width, eps=1e-3) if first else nn.Identity()
        self.is_causal = of.is_causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a vector for each example, or for each token."""
        x = self.first(x)
        x = (x.flatten(2).transpose(1, 2) if x.ndim == 4 else x) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device) if self.is_causal else None
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=self.is_causal)
        x = self.norm(x)
        return x if self.is_causal else x.mean(1)


def make(case: Case) -> tuple[nn.Module, nn.Linear, torch.Tensor, torch.Tensor]:
    """Build a backbone and a head, and draw inputs and targets."""
    torch.manual_seed(0)
    count, size = case.batch * case.steps, case.size
    labels = torch.randint(0, 10, (count,))
    if case.workload == "mlp":
        width = int(128 * case.width)
        backbone = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        return backbone, nn.Linear(width, 10), torch.randn(count, 64), labels
    if case.workload in TRANSFORMERS:
        of = Transformer.of(case)
        x = torch.randint(0, of.vocabulary, (count, size)) if of.vocabulary else torch.randn(count, 3, size, size)
        y = torch.randint(0, of.vocabulary, x.shape) if of.is_causal else labels
        return Stack(case), nn.Linear(of.width, of.vocabulary if of.is_causal else 10), x, y
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    wide = 64
    for stage, (filters, number) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):  # He et al., 2015, table 1
        for block in range(number):
            parts.append(Bottleneck(wide, filters, 2 if stage and not block else 1))
            wide = 4 * filters
    backbone = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return backbone, nn.Linear(wide, 10), torch.randn(count, 3, size, size), labels


def loss_of(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of examples, or of tokens."""
    return nn.functional.cross_entropy(outputs.float().flatten(0, -2), y.flatten())


def make_arm(case: Case) -> Callable[[int], float]:
    """Build an arm, which goes through the data in its order and returns the mean loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # as TensorFlow has it: TF32 where there is
    torch.backends.cudnn.benchmark = True
    backbone, head, x, y = (part.to(device) for part in make(case))
    backbone.requires_grad_(case.selection == "all").train(case.selection == "all")
    if case.selection == "last_block":
        blocks = [p for p in backbone.modules() if isinstance(p, (nn.TransformerEncoderLayer, Bottleneck))]
        (blocks or [backbone[-2]])[-1].requires_grad_(True).train()
    is_tuned = "compile" in case.changes
    if is_tuned and x.ndim == 4:
        backbone, x = backbone.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if case.base == "lightning":
        from benchmarks import lightning_peer  # here, since Lightning is asked for by this arm alone

        run = lightning_peer.make_arm(case, backbone, head, x, y)
        run.data_bytes = x.nbytes + y.nbytes
        return run
    model = nn.Sequential(backbone, head)
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer, batch = torch.optim.Adam(moved, 1e-4, fused=is_tuned or None), case.batch
    model = torch.compile(model) if is_tuned else model

    def run(steps: int) -> float:
        total = torch.zeros((), device=device)
        for number in range(steps):
            chosen = slice(number * batch, (number + 1) * batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = loss_of(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / steps

    run.data_bytes = x.nbytes + y.nbytes
    return run


def step(case: Case) -> Generator[None, None, dict[str, Any]]:
    """Time an arm; on a GPU, read PyTorch's allocator afterwards, less the data of steps but two, as for TensorFlow."""
    is_on_gpu = torch.cuda.is_available()
    if devices.gpus() and not is_on_gpu:
        raise RuntimeError("PyTorch does not see the GPU: install a build of it for CUDA.")
    arm, figures = yield from rounds(case, lambda: make_arm(case))
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
        arm(min(case.steps, 2))
        spare = int(arm.data_bytes * (1 - min(case.steps, 2) / case.steps))
        figures["peak"] = torch.cuda.max_memory_allocated() - spare
    return figures
