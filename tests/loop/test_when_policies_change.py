"""When a policy is asked, with what, and when its answer takes effect."""

import numpy as np
import pytest

import tapeloop as tl
from tests.support import models
from tests.support.fitting import X, Y, fit, mlp
from tests.support.models import trainer_of
from tests.support.policies import Asked

HEAD, ALL = tl.TrainOnly("head"), tl.TrainAll()
DATA = [(X, Y)] * 4


def phases_of(trainer, **options):
    """From which step on what trains, in a fit of four batches an epoch."""
    phases = trainer.fit(DATA, verbose=0, **options).phases
    return [(phase.step, phase.policy) for phase in phases]


def small(policy):
    return tl.Trainer(mlp("base", "head"), policy, loss="mse", optimizer="sgd")


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 4, 8]), (3, [0, 3, 4, 6, 8, 9])])
def test_a_policy_is_asked_once_an_epoch_or_every_so_many_steps(every, steps):
    trainer = small(policy := Asked(every=every))
    trainer.fit(DATA, epochs=3, validation_data=DATA, verbose=0)
    assert policy.steps == steps
    trainer.evaluate(DATA, verbose=0)
    trainer.predict(X)
    assert policy.steps == steps


def test_the_answer_is_remembered_by_who_looks_between_two_fits():
    trainer = small(policy := Asked())
    for _ in range(2):
        _ = trainer.selection, trainer.explain(), dict(trainer.learning_rates)
    trainer.evaluate(DATA, verbose=0)
    trainer.fit(DATA, verbose=0)
    assert policy.seen == [(0, 0, {})]


def test_a_random_policy_trains_the_same_with_and_without_validation():
    chosen = []
    for validation in (None, DATA):
        random = np.random.default_rng(0)
        policy = Asked(lambda progress: tl.TrainOnly(f"d{random.integers(4)}"))  # noqa: B023
        trainer = tl.Trainer(mlp("d0", "d1", "d2", "d3", "head"), policy, loss="mse", optimizer="sgd")
        chosen.append(phases_of(trainer, epochs=4, validation_data=validation))
    assert chosen[0] == chosen[1]


def test_what_a_policy_answers_with_is_asked_as_often_as_it_says():
    trainer = small(Asked(lambda progress: tl.Cycle([HEAD, ALL], every=2) if progress.epoch else ALL))
    assert phases_of(trainer, epochs=2) == [(0, ALL), (4, HEAD), (6, ALL)]


def test_within_an_epoch_a_policy_gets_the_logs_so_far():
    trainer = small(policy := Asked(every=2))
    losses = trainer.fit(DATA, epochs=2, verbose=0).history["loss"]
    logs = {step: logs for step, _, logs in policy.seen}
    assert logs.keys() == {0, 2, 4, 6}
    assert logs[2]["loss"] != losses[0]
    assert logs[4] == {"loss": losses[0]}


def test_a_policy_sees_the_last_logs_at_every_epochs_start():
    trainer = small(policy := Asked(lambda progress: ALL if "val_loss" in progress.logs else HEAD))
    assert phases_of(trainer, epochs=2, validation_data=DATA) == [(0, HEAD), (4, ALL)]
    assert [(step, epoch, sorted(logs)) for step, epoch, logs in policy.seen] == [
        (0, 0, []), (4, 1, ["loss", "val_loss"]),
    ]  # fmt: skip


def test_numpy_counts_serve_as_pythons_do():
    trainer = small(tl.Phases({np.int64(0): HEAD, np.int64(2): ALL}, unit="step"))
    assert phases_of(trainer, epochs=np.int32(1)) == [(0, HEAD), (2, ALL)]
    assert tl.Cycle([HEAD], every=np.int8(3)) == tl.Cycle([HEAD], every=3)


class Moody(Asked):
    """Answers with itself, and selects more the second time."""

    def __init__(self, every):
        super().__init__(lambda progress: self, every)

    def group(self, variable):
        return "all" if variable.path.startswith("head") or len(self.seen) > 1 else None


def test_a_policy_with_state_of_its_own_is_asked_anew_each_time():
    policy = Moody(every=2)
    assert phases_of(small(policy)) == [(0, policy), (2, policy)]


def test_a_flag_toggled_between_epochs_takes_effect_at_the_next():
    def toggled(progress):
        model.get_layer("base").trainable = not progress.epoch
        return ALL

    model = models.functional()
    history = trainer_of(model, Asked(toggled)).fit(models.images(8), epochs=2, verbose=0)
    assert [len(phase.selection.trained) for phase in history.phases] == [6, 2]


def test_a_policy_that_first_returns_itself_may_have_optimizers_for_later():
    policy = Moody(every=None)
    policy.answer = lambda progress: tl.Groups({"all": "head", "h": "base"}) if progress.epoch else policy
    trainer = fit(mlp("base", "head"), policy, optimizer={"all": "sgd", "h": "adam"})
    trainer.fit(DATA, verbose=0)
    assert len(trainer.history.phases) == 2
