"""Training, evaluating and predicting with the frozen part folded."""

import gc
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop._backend import onednn
from tapeloop.folding.store import MOST_KEEPING, FoldedPart, FoldedValues
from tapeloop.step.plan import Interventions

layers = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 6, 6, 3)).astype("float32"), RNG.integers(0, 3, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def normalized(block, name):
    return [block, layers.BatchNormalization(name=f"{name}_bn"), layers.Activation("tanh")]


def network(before=(), behind=()):
    keras.utils.set_random_seed(3)
    base = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            *normalized(layers.Conv2D(4, 3, use_bias=False, name="conv"), "conv"),
            *normalized(layers.DepthwiseConv2D(2, name="depthwise"), "depthwise"),
            layers.GlobalAveragePooling2D(),
        ],
        name="base",
    )
    for variable in base.variables:
        if "kernel" not in variable.path:
            variable.assign(RNG.uniform(0.5, 1.5, variable.shape))
    return keras.Sequential([keras.Input((6, 6, 3)), *before, base, *behind, layers.Dense(3, name="head")])


def trainer_of(model, policy=None, kind=tl.Trainer, **options):
    options = {"loss": LOSS, "optimizer": keras.optimizers.SGD(0.1), "seed": 0, "fold_frozen": True, **options}
    return kind(model, policy or tl.TrainOnly("head"), **options)


def pair(policy=None, kind=tl.Trainer, before=(), **options):
    """A trainer that folds and one that does not, of equal models."""
    folds, plain = network([make() for make in before]), network([make() for make in before])
    plain.set_weights(folds.get_weights())
    return trainer_of(folds, policy, kind, **options), trainer_of(plain, policy, kind, fold_frozen=False, **options)


def folded(trainer):
    """How many values the trainer's steps have folded."""
    return len({id(value) for value in trainer._loop.steps.folding.store.known()})


def same(folds, plain):
    for one, other in zip(folds.model.variables, plain.model.variables):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


def fitted(pair, **options):
    histories = [each.fit(X, Y, batch_size=8, verbose=0, **options).history for each in pair]
    for name in histories[1]:
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-5)
    same(*pair)
    return histories[0]


def test_a_fit_gives_the_same_and_frozen_weights_stay_bit_identical():
    folds, plain = pair(metrics=["accuracy"])
    before = [variable.numpy() for variable in folds.model.get_layer("base").variables]
    fitted((folds, plain), epochs=2, validation_data=(X, Y))
    # Two chains, each a kernel and a bias, which training and evaluation share.
    assert (folded(folds), folded(plain)) == (4, 0)
    for old, variable in zip(before, folds.model.get_layer("base").variables):
        assert old.tobytes() == variable.numpy().tobytes()
    np.testing.assert_allclose(folds.predict(X), plain.predict(X), rtol=1e-5, atol=1e-6)
    assert folded(folds) == 4
    assert folds.trace_count == plain.trace_count == 1


@pytest.mark.parametrize("options", [{"microbatches": 3}, {"jit_compile": True}, {"nonfinite": "skip"}, {"ema": 0.9}])
def test_so_does_a_fit_with_options(options):
    folds, plain = pair(**options)
    fitted((folds, plain))
    assert folded(folds) == 4


def test_what_trains_below_the_frozen_part_gets_the_same_gradients():
    folds, plain = pair(
        tl.TrainOnly("below", "head"), before=[lambda: layers.Conv2D(3, 3, padding="same", name="below")]
    )
    fitted((folds, plain))
    assert folded(folds)


def change_by_hand(trainer):
    base = trainer.model.get_layer("base")
    for variable in base.variables:
        variable.assign(variable * 1.5)


def test_weights_set_by_hand_between_two_calls_are_noticed():
    folds, plain = both = pair()
    fitted(both)
    for each in both:
        change_by_hand(each)
    fitted(both)
    for each in both:
        change_by_hand(each)
    np.testing.assert_allclose(folds.predict(X), plain.predict(X), rtol=1e-5, atol=1e-6)
    for each in both:
        change_by_hand(each)
    losses = [each.evaluate(X, Y, verbose=0)["loss"] for each in both]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.skipif(not onednn.is_used(), reason="TensorFlow does not use oneDNN here")
def test_kernels_are_kept_until_weights_move():
    trainer = trainer_of(network())
    store = trainer._loop.steps.folding.store

    def kept():
        return sum(part.keeps_filters for step in trainer._loop.steps._steps.values() for part in step._folded)

    for _ in range(2):
        trainer.fit((X, Y), batch_size=8, verbose=0)
        trainer.evaluate((X, Y), verbose=0)
        assert (kept(), store.have_moved, trainer.trace_count) == (2, False, 1)
    change_by_hand(trainer)
    trainer.fit((X, Y), batch_size=8, verbose=0)
    trainer.evaluate((X, Y), verbose=0)
    assert (kept(), store.have_moved, trainer.trace_count) == (0, True, 1)


def test_weights_moved_while_a_step_runs_first_and_put_back_are_noticed():
    losses = []
    # A kernel that no chain takes in is kept as it is.
    below = [lambda: layers.Conv2D(3, 3, padding="same", name="below")]
    for trainer in pair(before=below, optimizer=keras.optimizers.SGD(0.0)):
        steps, kernel = trainer._loop.steps, trainer.model.get_layer("below").kernel
        first, moved = kernel.numpy(), []

        def draw(x, y, steps=steps, kernel=kernel, first=first, moved=moved):
            # Batches are drawn ahead: this one waits for the step that was built of the weights as they were.
            while steps.folding.mode and onednn.is_used() and not steps.folding.store.keeping and not moved:
                time.sleep(0.01)
            if not moved:
                kernel.assign(first * 3)
                moved.append(True)
            return x, y

        def given(x, y, draw=draw):
            both = tf.numpy_function(draw, [x, y], [tf.float32, tf.int64])
            return tuple(tf.ensure_shape(one, like.shape) for one, like in zip(both, (x, y)))

        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).map(given)
        trainer.fit(data, verbose=0)
        assert moved
        kernel.assign(first)
        losses.append([trainer.fit(data, verbose=0).history["loss"][0] for _ in range(2)])
    np.testing.assert_allclose(*losses, rtol=1e-5)


class MovesInEvaluation(tl.Trainer):
    def eval_step(self, batch):
        kernel = self.model.get_layer("base").layers[0].kernel
        kernel.assign(kernel * 1.2)
        return {"loss": tf.reduce_mean(self.forward(batch[0], training=False))}


def test_weights_moved_by_an_evaluation_are_noticed():
    fitted(pair(kind=MovesInEvaluation), epochs=3, validation_data=(X, Y))


class CallsPython(tl.Trainer):
    def train_step(self, batch):
        kernel = self.model.get_layer("base").layers[0].kernel

        def move():
            kernel.assign(kernel * 1.1)

        tf.py_function(move, [], [])
        return super().train_step(batch)


def test_a_step_that_calls_python_is_not_folded():
    trainer = trainer_of(network(), kind=CallsPython)
    trainer.fit((X, Y), batch_size=8, verbose=0)
    assert folded(trainer) == 0


def test_few_traces_keep_kernels():
    keeping = FoldedValues()
    parts = [FoldedPart([], [], list, Interventions(), True) for _ in range(MOST_KEEPING)]
    for number, part in enumerate(parts):
        assert keeping.may_keep_filters, number
        keeping.keeping.add(part)
    assert not keeping.may_keep_filters
    del part, parts[0]
    assert keeping.may_keep_filters


def test_weights_loaded_between_two_fits_are_noticed(tmp_path):
    both = pair()
    plain = both[1]
    plain.model.save_weights(tmp_path / "first.weights.h5")
    change_by_hand(plain)
    plain.model.save_weights(tmp_path / "other.weights.h5")
    plain.model.load_weights(tmp_path / "first.weights.h5")
    fitted(both)
    for each in both:
        each.model.load_weights(tmp_path / "other.weights.h5")
    fitted(both)


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end", "on_train_batch_end", "on_test_begin"])
def test_weights_set_by_a_callback_are_noticed(hook):
    both = pair()

    def callback(trainer):
        return keras.callbacks.LambdaCallback(**{hook: lambda *_: change_by_hand(trainer)})

    if hook == "on_test_begin":  # which a `LambdaCallback` does not have

        class AtTests(keras.callbacks.Callback):
            def on_test_begin(self, logs=None):
                change_by_hand(self.trainer)

        def callback(trainer):
            found = AtTests()
            found.trainer = trainer
            return found

    histories = [
        each.fit(X, Y, batch_size=8, epochs=2, validation_data=(X, Y), callbacks=[callback(each)], verbose=0).history
        for each in both
    ]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-5)


def test_a_callback_that_sets_weights_and_evaluates_sees_them():
    losses = []
    for each in pair():

        def evaluate(*_, trainer=each):
            losses.append(trainer.evaluate(X, Y, verbose=0)["loss"])
            change_by_hand(trainer)
            losses.append(trainer.evaluate(X, Y, verbose=0)["loss"])
            losses.append(float(LOSS(Y, trainer.predict(X))))

        callback = keras.callbacks.LambdaCallback(on_epoch_end=evaluate)
        each.fit(X, Y, batch_size=8, callbacks=[callback], verbose=0)
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-5)


class SetsWeights(tl.VariablePolicy):
    """Sets frozen weights whenever it is asked."""

    every = 2

    def __init__(self):
        self.trainer = None

    def group(self, variable):
        return "head" if variable.path.startswith("head") else None

    def at(self, progress):
        change_by_hand(self.trainer)
        return self

    def get_state(self):
        return {}


def test_weights_set_by_a_policy_are_noticed():
    both = pair()
    for each in both:
        each.policy = SetsWeights()
        each.policy.trainer = each
    fitted(both, epochs=2)


def test_what_another_phase_has_trained_is_folded_anew():
    policy = tl.Phases({0: tl.TrainOnly("head"), 1: tl.TrainOnly("base"), 2: tl.TrainOnly("head")})
    both = pair(policy)
    fitted(both, epochs=3, validation_data=(X, Y))


def test_averages_of_what_was_frozen_later_are_seen_by_a_validation():
    policy = tl.Phases({0: tl.TrainAll(), 1: tl.TrainOnly("head")})
    both = pair(policy, ema=0.5)
    fitted(both, epochs=3, validation_data=(X, Y), validate_with="ema")


class Distills(tl.Trainer):
    """Learns from a frozen teacher that stands beside its model."""

    def compute_loss(self, batch, training):
        x, _ = batch
        return tf.reduce_mean((tf.stop_gradient(self.teacher(x, training=False)) - self.forward(x, training)) ** 2)


def test_a_frozen_teacher_beside_the_model_is_folded():
    folds, plain = both = pair(tl.TrainAll(), Distills)
    for each in both:
        each.teacher = network()
        each.teacher.set_weights([1.1 * value for value in plain.model.get_weights()])
    fitted(both)
    assert folded(folds) == 4


class Follows(Distills):
    """Its teacher follows the student."""

    def train_step(self, batch):
        logs = super().train_step(batch)
        self.follow(self.teacher, self.model, decay=0.5)
        return logs


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}], ids=str)  # pieces move the teacher after the step
def test_a_teacher_that_moves_is_not(options):
    both = pair(tl.TrainAll(), Follows, **options)
    for each in both:
        each.teacher = network()
        each.teacher.set_weights(both[0].model.get_weights())
    fitted(both, epochs=2, validation_data=(X, Y))


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}], ids=str)
def test_a_part_of_the_model_that_trains_is_not_folded_because_the_trainer_holds_it(options):
    both = pair(tl.TrainOnly("base/conv", "head"), **options)
    for each in both:
        each.part = each.model.get_layer("base")
    fitted(both, epochs=2)


class Perturbs(tl.Trainer):
    """Assigns to a frozen variable of its model in each step."""

    def train_step(self, batch):
        kernel = self.model.get_layer("base").get_layer("conv").kernel
        kernel.assign(kernel * 1.01)
        return super().train_step(batch)


def test_what_the_users_step_assigns_to_is_not_folded():
    both = pair(kind=Perturbs)
    fitted(both, epochs=2, validation_data=(X, Y))


def test_statistics_of_what_trains_are_not_folded():
    folds, plain = pair(tl.TrainAll())
    fitted((folds, plain), validation_data=(X, Y))
    assert folded(folds) == 0


def test_casts_of_frozen_weights_are_made_once():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    folds = trainer_of(model)
    folds.fit(X, Y, verbose=0)
    dtypes = [value.variable.dtype for value in folds._loop.steps.folding.store.known()]
    assert dtypes.count(tf.bfloat16) >= 2
    losses = [
        folds.evaluate(X, Y, verbose=0)["loss"],
        trainer_of(model, fold_frozen=False).evaluate(X, Y, verbose=0)["loss"],
    ]
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_by_itself_a_long_fit_is_folded_and_a_short_one_is_not():
    trainer = trainer_of(network(), fold_frozen="auto")
    trainer.fit(X, Y, batch_size=8, epochs=8, verbose=0)
    assert folded(trainer) == 0  # 48 steps
    trainer.fit(X, Y, batch_size=8, epochs=9, verbose=0)
    assert folded(trainer) == 4
    assert trainer.trace_count == 1
    trainer.fit(X, Y, batch_size=8, verbose=0)  # it stays folded
    assert folded(trainer) == 4


def test_by_itself_a_fit_that_is_looked_at_after_each_step_is_not():
    trainer = trainer_of(network(), fold_frozen="auto")
    looks = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    trainer.fit(X, Y, batch_size=8, epochs=9, callbacks=[looks], verbose=0)
    assert folded(trainer) == 0


def test_single_batches_are_never_folded():
    trainer = trainer_of(network())
    trainer.train_on_batch(X, Y)
    assert folded(trainer) == 0


def test_folded_values_go_with_the_steps_that_use_them():
    trainer = trainer_of(network())
    trainer.fit(X, Y, verbose=0)
    assert folded(trainer) == 4
    trainer._loop.steps.forget()
    trainer._loop.phases.start_over(None, "", {})  # it holds the step that trained last
    gc.collect()
    assert folded(trainer) == 0


def test_another_value_of_the_option_is_refused():
    with pytest.raises(ValueError, match=r"`fold_frozen` must be True, False or 'auto'\. Received: 'never'\."):
        trainer_of(network(), fold_frozen="never")
