"""How steps are run: compiled by XLA where it can, op by op on demand."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.step.plan import Compilation
from tests.support import models
from tests.support.inspect import step_of
from tests.support.models import trainer_of

layers = keras.layers


def still():
    """A model with nothing random in it, for XLA draws other numbers."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    base = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8, activation="relu")], name="base")
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.BatchNormalization()(base(inputs))))


OPTIONS = [{}, {"microbatches": 3, "clip_norm": 1.0}, {"nonfinite": "ignore", "ema": 0.9}, {"remat": "base"}]


def cases():
    """Every option run eagerly and by XLA, the last two of them there slowly."""
    for how in ({"jit_compile": True}, {"run_eagerly": True}):
        for options in OPTIONS:
            slow = "jit_compile" in how and options in OPTIONS[2:]
            yield pytest.param(how, options, id=f"{how}-{options}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("how", "options"), list(cases()))
def test_xla_and_eager_steps_end_as_the_compiled_ones(how, options):
    results = []
    for running in ({"jit_compile": False}, how):
        model = still()
        trainer = trainer_of(model, tl.TrainOnly("base", "head"), metrics=["accuracy"], **running, **options)
        history = trainer.fit(models.images(12), batch_size=8, epochs=2, shuffle=False, progress="none").history
        results.append((model.get_weights(), history, trainer.evaluate(models.images(12), progress="none")))
        assert trainer.predict(models.images(12)[0]).shape == (12, 3)
        assert trainer.trace_count == (0 if "run_eagerly" in running else 1)
    for mine, its in zip(results[0][0], results[1][0]):
        np.testing.assert_allclose(mine, its, atol=1e-5)
    for name, values in results[0][1].items():
        np.testing.assert_allclose(results[1][1][name], values, rtol=1e-4)


def test_by_itself_there_is_no_xla_on_the_cpu():
    gpus = bool(tf.config.list_physical_devices("GPU"))
    assert Compilation(False, "auto").uses_xla == gpus
    assert Compilation(False, True).uses_xla
    assert not Compilation(False, False).uses_xla


class WhereThereIsAGPU(Compilation):
    """Tries XLA by itself, as on a GPU."""

    uses_xla = property(lambda self: self.jit_compile == "auto")


def strange(batch):
    return tf.strings.length(tf.strings.as_string(batch))


def test_where_xla_cannot_compile_a_warning_names_the_op_and_the_step_goes_on_without():
    step = step_of(strange, WhereThereIsAGPU(False, "auto"))
    with pytest.warns(
        UserWarning, match=r"XLA cannot compile the predict step because of the op `(AsString|StringLength)`"
    ):
        assert step(tf.constant([12])).numpy() == [len("12")]
    assert step(tf.constant([345])).numpy() == [3]  # and says so once


def test_xla_that_was_asked_for_is_not_given_up():
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.UnimplementedError), match="XLA"):
        step_of(strange, Compilation(False, True))(tf.constant([12]))


class Looking(tl.Trainer):
    """Looks at numbers in Python, which only an eager step can."""

    def train_step(self, batch):
        x, y = batch
        with self.tape() as tape:
            logits = self.model(x, training=True)
            self.seen.append(logits.numpy().shape)
            loss = models.cross_entropy()(y, logits)
        self.update(tape, loss)
        return {"loss": loss}


def test_an_eager_step_shows_its_numbers():
    trainer = Looking(models.functional(), tl.Freeze("base"), run_eagerly=True)
    trainer.seen = []
    before = models.values(trainer.model, "base")
    trainer.fit(models.images(12), batch_size=8, progress="none")
    assert trainer.seen == [(8, 3), (4, 3)]
    assert models.values(trainer.model, "base") == before


def test_the_optimizers_own_variables_are_not_taken_for_the_models():
    trainer_of(still(), optimizer="nadam").fit(models.images(8), progress="none")  # a warning would be an error


def test_options_may_be_numpys():
    trainer_of(still(), ema=np.float32(0.5), clip_norm=np.float64(1.0), microbatches=np.int8(2), seed=np.int64(3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": "a"}, r"`seed` must be a whole number, 0 or more. Received: 'a'"),
        ({"jit_compile": "yes"}, r"`jit_compile` must be True, False or 'auto'. Received: 'yes'"),
        ({"run_eagerly": 1}, r"`run_eagerly` must be True or False. Received: 1"),
        (
            {"run_eagerly": True, "jit_compile": True},
            r"`run_eagerly=True` runs op by op, and `jit_compile=True` compiles",
        ),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        trainer_of(**options)


def test_trainers_in_threads_leave_the_setting_of_the_process_as_it_was():
    def train(seed):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        tl.Trainer(model, loss="mse", seed=seed).fit((np.ones((8, 3)), np.ones((8, 1))), progress="none")

    for _ in range(3):
        threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not tf.config.functions_run_eagerly()
