"""All that a fit changes stands in the model or in the trainer's state, or is made anew by the next fit."""

import keras
import numpy as np

import tapeloop as tl
from tapeloop.model.tree import raw
from tests.support import models
from tests.support.snapshot import snapshot, walk
from tests.support.steps import Counting

X, Y = models.images(16)

# What the next fit makes anew, by the end of its path.
MADE_ANEW = {
    "parts.counts": "set before each call of the loop",
    "planner.check.kept": "checksums of the last step",
    "_parts.means": "sums of logs, reset at the start of an epoch",
    "parts.objective": "metrics, reset at the start of an epoch",
    "pace.steps": "measured in each call",
    "_latest": "the loop of the cursor that was used last",
    "_is_tried": "found by trial",
    "_steps": "compiled steps, in the order in which they were used",
    "_is_reset": "what the last step on one batch has reset",
    "_on_batch": "what trains on single batches",
    "phases._asked": "the policy's last answer",
    "phases._answer": "the policy's last answer",
    "phases._of_epoch": "selections, resolved at the start of an epoch",
    "phases._prepared": "what was prepared last",
    "interventions.count": "how often other code ran, which no two runs compare",
}


def test_all_that_a_fit_changes_is_state_or_made_anew():
    keras.utils.set_random_seed(0)
    model = models.functional()
    policy = tl.Cycle([tl.TrainOnly("head"), tl.TrainOnly("base")], every=2)
    options = {"optimizer": "adam", "ema": 0.9, "nonfinite": "skip", "metrics": ["accuracy"], "clip_norm": 1.0}
    trainer = Counting(model, policy, loss=models.cross_entropy(), seed=0, **options)
    bad = [(X[:4], Y[:4], np.full(4, np.nan))]

    def fit():
        batches = [(X[n : n + 4], Y[n : n + 4], np.ones(4)) for n in range(0, 16, 4)]
        trainer.fit(batches + bad, validation_data=batches, epochs=2, verbose=0)

    fit()  # everything is traced, and each phase has been
    before, values = snapshot(trainer), models.values(model)
    fit()
    after = snapshot(trainer)
    assert models.values(model) != values
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    kept = {path for path in changed if path.startswith("state.")}
    for name in ("step", "epoch", "history", "optimizers", "averages", "logs"):
        assert any(path.startswith(f"state.{name}") for path in kept), f"{name} is not in the state: {sorted(kept)}"
    own = {path for path in changed if path in ("trained", "evaluated") or path.startswith("_parts.attributes")}
    assert own
    unknown = {path for path in changed - kept - own if not any(end in path for end in MADE_ANEW)}
    assert not unknown
    assert {v.ref() for v in trainer.state.variables} >= {
        raw(v).ref() for cohort in trainer.state.optimizers.cohorts for v in cohort.optimizer.variables
    }


def test_a_snapshot_notices_what_joins_a_set():
    members, before, after = {"a"}, {}, {}
    walk(members, "members", before, set())
    members.add("b")
    walk(members, "members", after, set())
    assert (before, after) == ({"members": {"a"}}, {"members": {"a", "b"}})
