"""How steps are run: compiled by XLA where it can, op by op on demand."""

import functools

import keras
import pytest
import tensorflow as tf

import tapeloop as tl
from tapeloop.step.plan import Compilation
from tests.support import models
from tests.support.compare import assert_close
from tests.support.fitting import X, Y, fit, in_threads, mlp, moved
from tests.support.inspect import step_of
from tests.support.models import trainer_of

layers = keras.layers


def still():
    """A model with nothing random in it, for XLA draws other numbers."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    base = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8, activation="relu")], name="base")
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.BatchNormalization()(base(inputs))))


def trained(how, options):
    trainer = trainer_of(still(), tl.TrainOnly("base", "head"), metrics=["accuracy"], **how, **options)
    trainer.fit(models.images(12), batch_size=8, epochs=2, shuffle=False, verbose=0)
    return trainer


COMPILED = functools.cache(lambda options: trained({"jit_compile": False}, dict(options)))
OPTIONS = [{}, {"microbatches": 3, "clip_norm": 1.0}, {"nonfinite": "ignore", "ema": 0.9}, {"remat": "base"}]


def cases():
    """Every option run eagerly and by XLA; there one of them quickly."""
    for how in ({"jit_compile": True}, {"run_eagerly": True}):
        for options in OPTIONS:
            slow = "jit_compile" in how and options in OPTIONS[1:]
            yield pytest.param(how, options, id=f"{how}-{options}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("how", "options"), list(cases()))
def test_xla_and_eager_steps_end_as_the_compiled_ones(how, options):
    trainer, expected = trained(how, options), COMPILED(tuple(options.items()))
    assert trainer.trace_count == (0 if "run_eagerly" in how else 1)
    assert_close(trainer, expected, atol=1e-5)
    assert_close(trainer.history.history, expected.history.history, rtol=1e-4)
    found, its = (each.evaluate(models.images(12), verbose=0) for each in (trainer, expected))
    assert found == pytest.approx(its, rel=1e-4)
    assert_close(trainer.predict(models.images(12)[0]), expected.predict(models.images(12)[0]), atol=1e-5)


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
    text = r"XLA cannot compile the predict step because of the op `(AsString|StringLength)`"
    with pytest.warns(UserWarning, match=text):
        assert step(tf.constant([12])).numpy() == [len("12")]
    assert step(tf.constant([345])).numpy() == [3]  # and says so once


def test_xla_that_was_asked_for_is_not_given_up():
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.UnimplementedError), match="XLA"):
        step_of(strange, Compilation(False, True))(tf.constant([12]))


class Looking(tl.Trainer):
    """Looks at numbers in Python, which only an eager step can."""

    def forward(self, inputs, training):
        outputs = super().forward(inputs, training)
        self.seen.append(outputs.numpy().shape)
        return outputs


def test_an_eager_step_shows_its_numbers():
    trainer = Looking(models.functional(), tl.Freeze("base"), loss=models.cross_entropy(), run_eagerly=True)
    trainer.seen = []
    found = moved(trainer.model, lambda: trainer.fit(models.images(12), batch_size=8, verbose=0))
    assert trainer.seen == [(8, 3), (4, 3)]
    assert found == {"head/kernel", "head/bias"}


def test_the_optimizers_own_variables_are_not_taken_for_the_models():
    trainer_of(still(), optimizer="nadam").fit(models.images(8), verbose=0)  # a warning would be an error


def test_trainers_in_threads_leave_the_setting_of_the_process_as_it_was():
    # Arrays, for TensorFlow warns of what threads do with `tf.data` while another traces.
    for _ in range(3):
        in_threads([lambda: fit(mlp("hidden", "head"), data=(X, Y))] * 3)
        assert not tf.config.functions_run_eagerly()
