"""The same architectures in PyTorch, trained by a plain loop or by Lightning: what another framework takes.

A process of its own, as for every arm; nothing else here imports PyTorch. Losses are not compared: weights are drawn
by another generator.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import torch
from torch import nn

from benchmarks.cases import Case, Group
from benchmarks.measure import Measured

TOKENS = 1000
RESNET_BLOCKS = ((64, 3), (128, 4), (256, 6), (512, 3))  # filters and count, by stage (He et al., 2015, table 1)


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


class Block(nn.Module):
    """A block of a transformer encoder, with an adapter or without."""

    def __init__(self, width: int, adapter: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-3) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.adapter = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)) if adapter else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        x = self.norms[0](x + self.attention(x, x, x, need_weights=False)[0])
        x = self.norms[1](x + self.feed(x))
        return x if self.adapter is None else x + self.adapter(x)


class Mean(nn.Module):
    """The mean over tokens, or over pixels."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean."""
        return x.mean(self.axes)


def make(group: Group) -> tuple[nn.Sequential, nn.Linear, torch.Tensor]:
    """Build a backbone and a head, and draw inputs."""
    torch.manual_seed(0)
    count = group.batch * group.steps
    if group.workload == "mlp":
        width = int(128 * group.width)
        backbone = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        return backbone, nn.Linear(width, 10), torch.randn(count, 64)
    if group.workload == "encoder":
        blocks = [Block(256, group.selection == "adapters") for _ in range(6)]
        backbone = nn.Sequential(nn.Embedding(TOKENS, 256), *blocks, Mean(1))
        return backbone, nn.Linear(256, 10), torch.randint(0, TOKENS, (count, group.size))
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    wide = 64
    for stage, (filters, number) in enumerate(RESNET_BLOCKS):
        for block in range(number):
            parts.append(Bottleneck(wide, filters, 2 if stage and not block else 1))
            wide = 4 * filters
    backbone = nn.Sequential(*parts, Mean(2, 3))
    return backbone, nn.Linear(wide, 10), torch.randn(count, 3, group.size, group.size)


def trained(backbone: nn.Module, selection: str) -> Iterable[nn.Parameter]:
    """Return what trains of a backbone."""
    if selection == "all":
        return backbone.parameters()
    return [p for name, p in backbone.named_parameters() if selection == "adapters" and "adapter" in name]


def make_arm(case: Case) -> Callable[[int], float]:
    """Build an arm, which goes through the data in its order and returns the mean loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # as TensorFlow has it: TF32 where there is
    torch.backends.cudnn.benchmark = True
    backbone, head, x = make(case.group)
    y = torch.randint(0, 10, (len(x),))
    if case.arm == "lightning":
        from benchmarks import lightning_peer  # here, since Lightning is asked for by this arm alone

        return lightning_peer.make_arm(case, backbone, head, x, y)
    backbone, head, x, y = backbone.to(device), head.to(device), x.to(device), y.to(device)
    backbone.requires_grad_(False)
    for parameter in trained(backbone, case.group.selection):
        parameter.requires_grad_(True)
    backbone.train(case.group.selection != "head")
    moved = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    optimizer, batch = torch.optim.Adam(moved, 1e-4), case.group.batch
    half = torch.autocast(device.type, torch.bfloat16, enabled=case.group.dtype == "bfloat16")

    def run(steps: int) -> float:
        total = torch.zeros((), device=device)
        for number in range(steps):
            chosen = slice(number * batch, (number + 1) * batch)
            with half:
                loss = nn.functional.cross_entropy(head(backbone(x[chosen])).float(), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / steps

    return run


class CudaAllocator:
    """What PyTorch's allocator says; nobody counts on the CPU."""

    def reset(self) -> None:
        """Let the peak be what is in use now."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int, int] | None:
        """Return the bytes in use and the most since the last reset."""
        return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def serve(pipe: Connection, case: Case, policy: str, one_thread: bool) -> None:
    """Build an arm and obey, as `worker.serve` does."""
    del policy, one_thread
    try:
        measured = Measured(make_arm(case), time.perf_counter, CudaAllocator())
        pipe.send({"torch": f"{torch.__version__} on {'cuda' if torch.cuda.is_available() else 'cpu'}"})
        while True:
            command, steps = pipe.recv()
            pipe.send(measured.round(steps) if command == "round" else measured.memory())
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"[:300]})
