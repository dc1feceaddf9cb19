"""When a policy is asked within an epoch, and with what."""

from dataclasses import dataclass

import numpy as np

import tapeloop as tl
from tests.support import models
from tests.support.models import trainer_of

HEAD, ALL = tl.Freeze("base"), tl.TrainAll()


@dataclass(frozen=True)
class FromTheSecondEpochInTurn(tl.VariablePolicy):
    """Says nothing of steps itself, and answers with a policy that does."""

    def at(self, progress):
        return tl.Cycle([HEAD, ALL], every=2) if progress.epoch else ALL


def test_what_a_policy_answers_with_is_asked_as_often_as_it_says():
    trainer = trainer_of(policy=FromTheSecondEpochInTurn())
    history = trainer.fit(models.images(8), batch_size=2, epochs=2, progress="none")
    assert [(phase.step, phase.policy) for phase in history.phases] == [(0, ALL), (4, HEAD), (6, ALL)]


def test_within_an_epoch_a_policy_gets_the_logs_so_far():
    seen = []

    class Asking(tl.VariablePolicy):
        every = 2

        def at(self, progress):
            seen.append((progress.step, dict(progress.logs)))
            return HEAD

    trainer = trainer_of(policy=Asking())
    history = trainer.fit(models.images(8), batch_size=2, epochs=2, progress="none").history
    within = {step: logs["loss"] for step, logs in seen if step % 4 == 2}
    assert within.keys() == {2, 6}
    assert within[2] != history["loss"][0]
    assert dict(seen)[4] == {"loss": history["loss"][0]}


def test_numpy_counts_serve_as_pythons_do():
    trainer = trainer_of(policy=tl.Phases({np.int64(0): HEAD, np.int64(2): ALL}, unit="step"))
    history = trainer.fit(models.images(8), batch_size=2, epochs=np.int32(1), progress="none")
    assert [(phase.step, phase.policy) for phase in history.phases] == [(0, HEAD), (2, ALL)]
    assert tl.Cycle([HEAD], every=np.int8(3)) == tl.Cycle([HEAD], every=3)
