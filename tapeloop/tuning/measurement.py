"""Measuring one candidate, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tapeloop.data.batch import map_tensors, tensors_in
from tapeloop.data.loader import DataSpec
from tapeloop.loop.epochs import EpochLoop
from tapeloop.step.frozen_dtype import FrozenDtype
from tapeloop.step.remat import Remat
from tapeloop.tuning import parcel as parcels
from tapeloop.tuning.candidates import Options, facts_of
from tapeloop.tuning.importable import Unsendable

# Windows has none.
resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None
MEASURED_S = 1.5  # for which steps are timed
PAIR_S = 0.3  # of two fits, whose difference is that of their steps
FEWEST_PAIRS, MOST_PAIRS = 3, 9
TOO_SLOW = 2.0  # times the fastest so far: not measured to the end


def run(pipe: Any, parcel: bytes, options: Options, fastest_ms: float | None) -> None:
    """Measure a candidate, and send what is found as it is found: dicts, of which a later one adds to the former.

    Args:
        pipe: Where to send it.
        parcel: The trainer and the data.
        options: The options in which the candidate differs from it.
        fastest_ms: The step of the fastest candidate so far, or None.
    """
    with _failures_sent(pipe):
        trained = _Trained(parcel, options, pipe.send)
        pipe.send({"step_ms": 1e3 * _step(trained.seconds, (fastest_ms or np.inf) / 1e3)})
        pipe.send({"peak_bytes": trained.memory.peak(), "is_done": True})


def take_turns(pipe: Any, parcel: bytes, options: Options) -> None:
    """Make a candidate ready, and then train as many steps as is asked for, as often as it is asked.

    Args:
        pipe: Where numbers of steps come from, and where the seconds go.
        parcel: The trainer and the data.
        options: The options in which the candidate differs from it.
    """
    with _failures_sent(pipe):
        trained = _Trained(parcel, options, lambda found: None)
        pipe.send({"is_ready": True})
        while True:
            pipe.send({"seconds": trained.seconds(pipe.recv())})


@contextlib.contextmanager
def _failures_sent(pipe: Any) -> Iterator[None]:
    """Send why a candidate fails inside this context, if it does."""
    # Where memory runs out, the system ends this process and not the program.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        yield
    except EOFError:  # nobody asks for more
        pass
    except (MemoryError, tf.errors.ResourceExhaustedError):
        pipe.send({"out_of_memory": True})
    except Unsendable as error:
        pipe.send({"unsendable": str(error)})
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        pipe.send({"error": f"{type(error).__name__}: {said}"})


class _Trained:
    """A candidate that has made its first steps.

    Attributes:
        memory: The memory that it needs.
    """

    def __init__(self, parcel: bytes, options: Options, send: Callable[[dict[str, Any]], None]) -> None:
        """Make it, train three steps, and send what is found.

        Raises:
            Unsendable: It cannot be made again.
        """
        try:
            opened = parcels.opened(parcel)
        except (MemoryError, Unsendable):
            raise
        except Exception as error:  # whatever Keras or the user's own classes raise
            raise Unsendable(f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]) from error
        self._data = data_of(opened.batches)
        began = time.perf_counter()
        self._trainer = trainer = opened.kind(*opened.made.args, **opened.made.kwargs)
        trainer.policy = opened.policy
        loop: EpochLoop = trainer._contents.loop
        loop.state.step, loop.state.epoch = opened.run
        take(loop, options)
        seconds = time.perf_counter() - began
        loop.steps.build(trainer.model, DataSpec("x", **self._data).loader().specs)
        parcels.check_same(trainer.model, opened.variables)
        send({"facts": facts_of(loop, trainer.selection)})
        self.memory = _Memory()
        taken, loss = self._fit(1)
        send({"first_step_s": seconds + taken})
        # The phase that holds now is measured, however many epochs that takes.
        trainer.policy = loop.state.policy[1] if loop.state.policy is not None else trainer.policy
        losses = [loss, self._fit(2)[1]]
        send({"losses": tuple(losses) if None not in losses else (), "peak_bytes": self.memory.peak()})

    def seconds(self, steps: int) -> float:
        """Train some steps, and return the seconds."""
        return self._fit(steps)[0]

    def _fit(self, steps: int) -> tuple[float, float | None]:
        """Train some steps, and return the seconds and the loss."""
        began = time.perf_counter()
        data, batch_size = self._data["data"], self._data["batch_size"]
        history = self._trainer.fit(data, batch_size=batch_size, steps_per_epoch=steps, shuffle=False, verbose=0)
        return time.perf_counter() - began, history.history.get("loss", [None])[-1]


def take(loop: EpochLoop, options: Options) -> None:
    """Give a trainer, which has made no step yet, other options.

    Folding is decided as for a long fit: `"auto"` goes by the number of steps, which are few here.

    Args:
        loop: Its loop.
        options: The options.
    """
    parts, folding = loop.steps.parts, loop.steps.folding
    compilation = {name: options[name] for name in ("jit_compile", "steps_per_call") if name in options}
    parts.compilation = dataclasses.replace(parts.compilation, **compilation)
    folding.mode = bool(options.get("fold_frozen", folding.mode))
    if "frozen_dtype" in options:
        parts.frozen_dtype = FrozenDtype(options["frozen_dtype"])
    if "remat" in options:
        parts.remat = Remat(options["remat"])


def data_of(batches: list[Any]) -> dict[str, Any]:
    """Return the data to fit, and its batch size: arrays, where the batches go together, or else a list of batches."""
    first = tensors_in(batches[0])
    signatures = [[(np.shape(one), getattr(one, "dtype", None)) for one in tensors_in(batch)] for batch in batches]
    is_dense = all(isinstance(one, np.ndarray) and one.ndim for batch in batches for one in tensors_in(batch))
    # A list would be taken for one of batches.
    if isinstance(batches[0], list) or not is_dense or any(each != signatures[0] for each in signatures):
        return {"data": batches, "batch_size": None}
    sizes = {len(one) for one in first}
    if len(sizes) != 1:
        return {"data": batches, "batch_size": None}
    arrays = tf.nest.map_structure(lambda *some: None if some[0] is None else np.concatenate(some), *batches)
    return {"data": map_tensors(tf.convert_to_tensor, arrays), "batch_size": sizes.pop()}


def _step(fit: Callable[[int], float], fastest_s: float) -> float:
    """Return the seconds of a step, from the differences of longer and shorter fits, which start alike.

    Args:
        fit: Trains so many steps, and returns the seconds.
        fastest_s: The step of the fastest candidate so far; what is far slower is not measured to the end.
    """
    rough = fit(3) / 3
    if rough > 2 * TOO_SLOW * fastest_s and fit(1) > TOO_SLOW * fastest_s:
        return rough
    few = max(1, int(PAIR_S / 4 / rough))
    # Of quick steps a fit takes the start for the most part, and the number of steps in a call has yet to grow.
    for _ in range(2 * (few > 1)):
        few = max(few, int(PAIR_S / 4 / (fit(3 * few) / (3 * few))))
    began, longer, shorter = time.perf_counter(), list[float](), list[float]()
    while len(longer) < FEWEST_PAIRS or (time.perf_counter() - began < MEASURED_S and len(longer) < MOST_PAIRS):
        longer.append(fit(3 * few))
        shorter.append(fit(few))
        # The least of each, and not the median of differences: what else the machine does takes time and gives none.
        step = max(1e-9, (min(longer) - min(shorter)) / (2 * few))
        if len(longer) > 1 and step > TOO_SLOW * fastest_s:
            break
    return step


class _Memory:
    """The memory that a candidate needs, from here on."""

    def __init__(self) -> None:
        self._on_gpu = bool(tf.config.list_logical_devices("GPU"))
        if self._on_gpu:
            tf.config.experimental.reset_memory_stats("GPU:0")
        self._before = _resident_bytes()

    def peak(self) -> int | None:
        """Return the most bytes since then: of a GPU in all, of the process beyond what it had."""
        if self._on_gpu:
            return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
        most = _most_resident_bytes()
        return None if most is None or self._before is None else max(0, most - self._before)


def _resident_bytes() -> int | None:
    """Return the bytes of this process that lie in memory now."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return _most_resident_bytes()


def _most_resident_bytes() -> int | None:
    """Return the most bytes of this process that ever lay in memory, where the system counts them."""
    if resource is None:
        return None
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most if sys.platform == "darwin" else 1024 * most
