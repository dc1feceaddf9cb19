"""What a step sees of its trainer, and what is said of the common mistakes of those who write one."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tests.support import models

layers = keras.layers
X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.ones((12, 1), "float32")
BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


def mlp():
    return keras.Sequential([keras.Input((4,)), layers.Dense(1, name="head")])


class Counts(tl.Trainer):
    def train_step(self, batch):
        logs = super().train_step(batch)
        assert tf.is_tensor(self.step)
        return {**logs, "step": self.step, "epoch": self.epoch}

    def eval_step(self, batch):
        return {**super().eval_step(batch), "step": self.step}


@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}, {"microbatches": 2}, {"steps_per_call": 1}], ids=str)
def test_step_and_epoch_are_tensors_that_go_on(how):
    trainer = Counts(mlp(), loss="mse", optimizer="sgd", **how)
    history = trainer.fit(BATCHES, epochs=3, validation_data=BATCHES, progress="none").history
    assert history["step"] == [1.0, 4.0, 7.0]  # the means of 0, 1, 2; 3, 4, 5; ...
    assert history["epoch"] == [0.0, 1.0, 2.0]
    assert history["val_step"] == [3.0, 6.0, 9.0]
    assert (trainer.step, trainer.epoch) == (9, 3)
    assert trainer.fit(BATCHES[:1], progress="none").history["step"] == [9.0]
    assert trainer.trace_count <= 1


def test_a_step_that_is_undone_does_not_count():
    batches = [BATCHES[0], (np.full_like(X[:4], np.nan), Y[:4]), BATCHES[1]]
    trainer = Counts(mlp(), loss="mse", optimizer="sgd", nonfinite="skip")
    assert trainer.fit(batches, progress="none").history["step"] == [0.5]
    assert trainer.step == 2


class Weighted(tl.Trainer):
    beta = 1.0

    def compute_loss(self, batch, training):
        return self.beta * super().compute_loss(batch, training)


def test_a_number_that_changes_after_the_trace_is_warned_of_once():
    trainer = Weighted(mlp(), loss="mse", optimizer="sgd")
    trainer.beta = 0.5
    trainer.fit(BATCHES, progress="none")
    trainer.fit(BATCHES, progress="none")  # a warning would be an error
    trainer.beta = 0.25
    with pytest.warns(
        UserWarning, match=r"`self.beta` was 0.5 when the train step was traced, and is 0.25 now.*tf.Variable"
    ):
        trainer.fit(BATCHES, progress="none")
    trainer.fit(BATCHES, progress="none")


def test_a_variable_may_change_and_so_may_a_number_that_no_step_reads():
    trainer = Weighted(mlp(), loss="mse", optimizer="sgd")
    trainer.beta, trainer.other = tf.Variable(0.5, trainable=False), 1
    trainer.fit(BATCHES, progress="none")
    trainer.beta.assign(0.0)
    trainer.other = 2
    assert trainer.fit(BATCHES, progress="none").history["loss"] == [0.0]


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_step_that_updates_nothing_says_so_once(eagerly):
    class Forgets(tl.Trainer):
        def train_step(self, batch):
            return {"loss": self.compute_loss(batch, training=True)}

    trainer = Forgets(mlp(), loss="mse", run_eagerly=eagerly)
    with pytest.warns(
        UserWarning, match=r"calls neither `self.update\(tape, loss\)`.*nothing trains of the 2 variables"
    ):
        trainer.fit(BATCHES, progress="none")
    trainer.fit([(X, Y)], progress="none")


def test_one_that_assigns_to_what_trains_says_nothing():
    class ByHand(tl.Trainer):
        def train_step(self, batch):
            for variable in self.model.trainable_variables:
                variable.assign(variable * 0.9)
            return {"loss": tf.zeros(())}

    ByHand(mlp(), loss="mse").fit(BATCHES, progress="none")


class Asked(tl.VariablePolicy):
    """Notes when it is asked."""

    def __init__(self, every=None):
        self.moments, self._every = [], every

    @property
    def every(self):
        return self._every

    def at(self, progress):
        self.moments.append((progress.step, progress.epoch))
        return tl.TrainAll()


@pytest.mark.parametrize(("every", "moments"), [(None, [0, 3, 6]), (2, [0, 2, 3, 4, 6, 8])])
def test_a_policy_is_asked_once_an_epoch_or_every_so_many_steps(every, moments):
    policy = Asked(every)
    trainer = tl.Trainer(mlp(), policy, loss="mse", optimizer="sgd")
    trainer.fit(BATCHES, epochs=3, validation_data=BATCHES, progress="none")
    assert [step for step, _ in policy.moments] == moments
    trainer.evaluate(BATCHES, progress="none")
    trainer.predict(X)
    assert [step for step, _ in policy.moments] == moments


def test_the_answer_is_remembered_by_who_looks_between_two_fits():
    policy = Asked()
    trainer = tl.Trainer(mlp(), policy, loss="mse", optimizer="sgd")
    for _ in range(2):
        _ = trainer.selection, trainer.explain(), dict(trainer.learning_rates)
    trainer.evaluate(BATCHES, progress="none")
    trainer.fit(BATCHES, progress="none")
    assert policy.moments == [(0, 0)]


def test_a_random_policy_trains_the_same_with_and_without_validation():
    class Random(tl.VariablePolicy):
        def __init__(self):
            self.random = np.random.default_rng(0)

        def at(self, progress):
            return tl.TrainOnly(f"d{self.random.integers(4)}")

    chosen = []
    for validation in (None, BATCHES):
        model = keras.Sequential(
            [keras.Input((4,)), *(layers.Dense(4, name=f"d{n}") for n in range(4)), layers.Dense(1)]
        )
        trainer = tl.Trainer(model, Random(), loss="mse", optimizer="sgd")
        history = trainer.fit(BATCHES, epochs=4, validation_data=validation, progress="none")
        chosen.append([[v.path for v in phase.selection.trained] for phase in history.phases])
    assert chosen[0] == chosen[1]


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(x)


OVERRIDES = {
    "train_step": lambda self, data: {},
    "test_step": lambda self, data: {},
    "compute_loss": lambda self, *args, **kwargs: 0.0,
    "compute_metrics": lambda self, *args, **kwargs: {},
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_model_with_a_step_of_its_own_is_refused_and_both_remedies_named(name):
    model = type("Mine", (Own,), {name: OVERRIDES[name]})()
    with pytest.raises(
        ValueError, match=rf"Mine has a `{name}` of its own.*Subclass `Trainer`.*`ignore_model_step=True`"
    ):
        tl.Trainer(model, loss="mse")
    tl.Trainer(model, loss="mse", ignore_model_step=True).fit(BATCHES, progress="none")

    class Replaces(tl.Trainer):
        def compute_loss(self, batch, training):
            return super().compute_loss(batch, training)

    Replaces(model, loss="mse").fit(BATCHES, progress="none")
    tl.Trainer(Own(), loss="mse")


def test_a_model_of_a_distribution_strategy_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = mlp()
        with pytest.raises(ValueError, match=r"MirroredStrategy.*trains on one device"):
            tl.Trainer(mlp(), loss="mse")
    with pytest.raises(ValueError, match=r"MirroredStrategy.*make both outside of `strategy.scope\(\)`"):
        tl.Trainer(model, loss="mse")


def test_a_missing_eval_step_is_named():
    class TrainsAlone(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                loss = tf.reduce_mean(self.model(batch[0]) ** 2)
            self.update(tape, loss)
            return {"loss": loss}

    trainer = TrainsAlone(mlp())
    trainer.fit(BATCHES, progress="none")
    with pytest.raises(
        ValueError, match=r"`TrainsAlone` overrides `train_step` and evaluates by the default `eval_step`"
    ):
        trainer.evaluate(BATCHES, progress="none")


def test_a_loss_computed_after_the_tape_is_named():
    class TooLate(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                outputs = self.model(batch[0])
            loss = tf.reduce_mean((outputs - batch[1]) ** 2)
            self.update(tape, loss)
            return {"loss": loss}

    with pytest.raises(
        tl.DisconnectedError, match=r"computed after the `with self.tape\(\.\.\.\)` block: move it inside"
    ):
        TooLate(mlp()).fit(BATCHES, progress="none")


def test_apply_takes_a_mapping():
    class Lists(tl.Trainer):
        def train_step(self, batch):
            with self.tape() as tape:
                loss = self.compute_loss(batch, training=True)
            self.apply(list(self.gradients(tape, loss).values()))
            return {"loss": loss}

    with pytest.raises(TypeError, match=r"`apply` takes gradients by the paths of variables.*Received: \["):
        Lists(mlp(), loss="mse").fit(BATCHES, progress="none")


def test_a_missing_call_of_the_constructor_is_named():
    class Forgets(tl.Trainer):
        def __init__(self, model):
            self.net = model

    with pytest.raises(RuntimeError, match=r"`Forgets.__init__` has not called `super\(\).__init__\(\.\.\.\)`"):
        Forgets(mlp()).fit(BATCHES, progress="none")
    with pytest.raises(AttributeError, match="'Trainer' has no attribute 'trian'"):
        _ = tl.Trainer(mlp()).trian


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_trainer_cannot_be_pickled_or_copied(copied):
    trainer = tl.Trainer(mlp(), loss="mse")
    trainer.fit(BATCHES, progress="none")
    with pytest.raises(
        TypeError, match=r"A Trainer cannot be pickled or copied: it holds compiled steps. Save the model"
    ):
        copied(trainer)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"loss": "mean_sqared_error"},
            r"`loss` is 'mean_sqared_error', and Keras has none of that name. .*'mean_squared_error'",
        ),
        (
            {"loss": "mse", "metrics": ["acuracy"]},
            r"`metrics` is 'acuracy', and Keras has none of that name. .*'accuracy'",
        ),
    ],
)
def test_an_unknown_name_is_said_at_once(options, text):
    with pytest.raises(ValueError, match=text):
        tl.Trainer(mlp(), **options)


def test_names_that_keras_knows_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in ("accuracy", "acc", "ce", "crossentropy", "mae", "MeanSquaredError", "AUC"):
            tl.Trainer(mlp(), loss="mse", metrics=[metric])
        for loss in ("mse", "MSE", "categorical_crossentropy", "KLDivergence", "huber"):
            tl.Trainer(mlp(), loss=loss)
        tl.Trainer(mlp(), loss=lambda y, p: tf.reduce_mean(y - p), metrics={"head": ["mae", "mse"]})


# What names variables


def backbone():
    inputs = keras.Input((6, 6, 1))
    base = keras.Sequential([inputs, *models.base_layers(), layers.Dense(4)])
    base.name = "base"
    return base, keras.Model(inputs, layers.Dense(1, name="head")(base(inputs)))


def test_slices_of_layers_may_hold_layers_without_weights():
    base, model = backbone()
    for policy in (
        tl.Freeze(*base.layers[:4]),
        tl.Freeze(base.layers[:4]),
        tl.Freeze([base.layers[0], "base/bn", base.layers[2]]),
    ):
        assert {v.path for v in tl.Trainer(model, policy, loss="mse").selection.frozen} == {
            "base/conv/kernel", "base/conv/bias", "base/bn/gamma", "base/bn/beta",
        }  # fmt: skip
    functional = keras.Model(base.inputs, base.outputs)
    assert tl.Trainer(functional, tl.Freeze(*functional.layers[:3]), loss="mse").selection.frozen  # an input among them


def test_lists_and_classes_serve_everywhere():
    _, model = backbone()
    selected = lambda policy: {v.path for v in tl.Trainer(model, policy, loss="mse").selection.trained}  # noqa: E731
    assert selected(tl.TrainOnly(layers.Dense)) == selected(tl.TrainOnly(tl.of_type(layers.Dense)))
    assert selected(tl.Groups({"all": [layers.Dense, "base/conv"]})) == selected(
        tl.TrainOnly("base/conv", layers.Dense)
    )
    assert selected(tl.GradualUnfreeze([["head", "base/conv"], "base"])) == selected(tl.TrainOnly("head", "base/conv"))
    assert selected(tl.TrainOnly(tl.glob("head") | ["base/conv"])) == selected(tl.TrainOnly("head", "base/conv"))


@pytest.mark.parametrize(
    ("policy", "error", "text"),
    [
        (
            lambda base: tl.Freeze(base.get_layer("flat")),
            tl.PolicyError,
            r"names only layers without",
        ),
        (lambda base: tl.Freeze([]), TypeError, r"A list must hold one or more"),
        (lambda base: tl.Freeze(layers.Dense(3)), tl.PolicyError, r"matches no variable of the model"),
        (lambda base: tl.Freeze(["base", "haed"]), tl.PolicyError, r"glob\('haed'\) in .* matches no variable"),
    ],
)
def test_what_names_nothing(policy, error, text):
    base, model = backbone()
    with pytest.raises(error, match=text):
        tl.Trainer(model, policy(base), loss="mse").fit(models.images(4), progress="none")


def test_what_keras_flag_froze_may_be_frozen_again_and_not_be_selected():
    base, model = backbone()
    base.trainable = False
    assert [v.path for v in tl.Trainer(model, tl.Freeze("base"), loss="mse").selection.trained] == [
        "head/kernel",
        "head/bias",
    ]
    with pytest.raises(tl.PolicyError, match=r"Set `trainable = True` on their layers"):
        _ = tl.Trainer(model, tl.TrainOnly("base"), loss="mse").selection


def test_a_name_with_brackets_matches_itself():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="block[0]"), layers.Dense(1, name="block0")])
    selected = lambda glob: [v.path for v in tl.Trainer(model, tl.TrainOnly(glob), loss="mse").selection.trained]  # noqa: E731
    assert selected("block[0]") == ["block[0]/kernel", "block[0]/bias", "block0/kernel", "block0/bias"]
    assert selected("block[[]0]") == ["block[0]/kernel", "block[0]/bias"]


def test_a_deep_copy_of_a_policy_names_the_same_layers():
    base, model = backbone()
    policy = tl.Phases({0: tl.Freeze(base, tl.under(base) & "**/kernel"), 1: tl.TrainAll()})
    copied = copy.deepcopy(policy)
    assert copied == policy
    assert tl.Trainer(model, copied, loss="mse").selection == tl.Trainer(model, policy, loss="mse").selection


def test_the_share_that_trains_is_of_the_parameters_beside_it():
    """64 of 92 numbers: the kernel alone of a Dense layer beside a BatchNormalization's four vectors of 4."""
    inner = keras.Sequential([keras.Input((16,)), layers.Dense(4), layers.BatchNormalization()], name="inner")
    model = keras.Sequential([keras.Input((16,)), inner, layers.Dense(1)])
    trainer = tl.Trainer(model, tl.TrainOnly(tl.under(inner) & tl.named("kernel")), loss="mse")
    line = next(line for line in trainer.explain().splitlines() if line.startswith("inner "))
    total = sum(int(np.prod(v.shape)) for v in inner.weights)
    assert f"{total}" in line
    assert f"trains {64 / total:.1%}" in line


def test_logs_that_an_epoch_has_not_are_nan():
    class Sometimes(tl.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            return {**logs, "few": tf.ones(())} if len(self.selection_names) == 1 else logs

        @property
        def selection_names(self):
            return list(self.selection.groups)

    policy = tl.Phases({0: tl.TrainAll(), 1: tl.Groups({"a": "head/kernel", "b": "head/bias"}), 2: tl.TrainAll()})
    history = Sometimes(mlp(), policy, loss="mse", optimizer="sgd").fit(BATCHES, epochs=3, progress="none").history
    assert [len(values) for values in history.values()] == [3, 3]
    assert history["few"][0] == history["few"][2] == 1.0
    assert np.isnan(history["few"][1])


def test_prediction_of_an_unbuilt_model_needs_no_targets():
    model = Own()
    trainer = tl.Trainer(model, loss="mse")
    outputs = trainer.predict(X)
    np.testing.assert_allclose(outputs, model(X), rtol=1e-6)
    trainer.fit(BATCHES, progress="none")
