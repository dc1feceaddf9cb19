"""The examples in docstrings run, each by itself, and every public class and function has one."""

import doctest
import inspect

import keras
import numpy as np
import pytest

import tapeloop as tl

# `apply` is shown with `gradients`.
VERBS = (
    *("fit", "evaluate", "predict", "train_on_batch", "explain", "frontier", "ema_weights", "learning_rates"),
    *("selection", "forward", "compute_loss", "train_step", "eval_step", "tape", "update", "gradients"),
    *("added_losses", "follow", "plot"),
)
DOCUMENTED = {name: getattr(tl, name) for name in tl.__all__}
DOCUMENTED |= {f"Trainer.{name}": inspect.getattr_static(tl.Trainer, name) for name in VERBS}
DOCUMENTED["History.plot"] = tl.History.plot


@pytest.mark.parametrize("name", DOCUMENTED)
def test_an_example_runs(name):
    documented = DOCUMENTED[name]
    test = doctest.DocTestParser().get_doctest(
        inspect.getdoc(documented), {"tl": tl, "keras": keras, "np": np, "__name__": "__main__"}, name, name, 0
    )
    assert test.examples
    assert "Example:" in inspect.getdoc(documented)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
