"""Options that a trainer cannot have are refused when it is made."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.models import trainer_of

NAN, SGD = float("nan"), keras.optimizers.SGD
COUNT = "must be a whole number, 1 or more. Received: "
SHARE = "`ema` must be above 0 and below 1, such as 0.999. Received: "
NO_SCALE = "must not scale the loss"


def summed(reduction):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


WRONG = {
    "nonfinite": [("warn", r"`nonfinite` must be one of 'raise', 'skip', 'ignore'. Received: 'warn'")],
    "max_skipped": [(0, f"`max_skipped` {COUNT}0")],
    "seed": [("a", "`seed` must be a whole number, 0 or more. Received: 'a'")],
    "jit_compile": [("yes", "`jit_compile` must be True, False or 'auto'. Received: 'yes'")],
    "run_eagerly": [(1, "`run_eagerly` must be True or False. Received: 1")],
    "ema": [(value, f"{SHARE}{value!r}") for value in (0, 1, 1.5, -0.1, True, "0.9")],
    "microbatches": [(value, f"`microbatches` {COUNT}") for value in (0, 2.5, "many", True)],
    "steps_per_call": [(value, f"`steps_per_call` {COUNT}") for value in (0, -1, 2.5, True, "all", None)],
    "clip_norm": [
        (0, "`clip_norm` must be above 0 and finite. Received: 0"),
        (NAN, "`clip_norm` must be above 0 and finite"),
    ],
    "loss": [("mean_sqared_error", r"`loss` is 'mean_sqared_error', and Keras has none .*'mean_squared_error'")],
    "metrics": [(["acuracy"], r"`metrics` is 'acuracy', and Keras has none of that name. .*'accuracy'")],
    "optimizer": [(SGD(rate), "`learning_rate` must be a finite number, 0 or more") for rate in (-1.0, NAN)],
}
OF_WRONG_TYPE = {
    "clip_norm": [
        ("1", r"`clip_norm` must be a number, or one for each of some groups. Received: '1'"),
        ({"head": True}, "`clip_norm` must be a number"),
    ],
    "remat": [(3, r"A filter must be a path glob, .* or a `Filter`. Received: 3")],
    "optimizer": [
        ("adm", r"`optimizer` is 'adm', and Keras has none of that name. Did you mean 'adam'"),
        *((given, "must be a Keras optimizer, its name, or a mapping") for given in (3, None, {"head": 3}, SGD)),
        (keras.optimizers.LossScaleOptimizer(SGD(0.1)), NO_SCALE),
        (SGD(0.1, loss_scale_factor=2.0), NO_SCALE),
        (SGD(0.1, use_ema=True), "must not have `use_ema=True`"),
        (
            SGD(0.1, gradient_accumulation_steps=4),
            r"must not accumulate gradients.*4 times the `batch_size`, and `microbatches=4`",
        ),
    ],
}
CASES = [
    (option, value, error, text)
    for error, options in ((ValueError, WRONG), (TypeError, OF_WRONG_TYPE))
    for option, cases in options.items()
    for value, text in cases
]


@pytest.mark.parametrize(("option", "value", "error", "text"), CASES)
def test_wrong_options(option, value, error, text):
    with pytest.raises(error, match=text):
        trainer_of(**{option: value})


def test_xla_and_eager_steps_exclude_each_other():
    with pytest.raises(ValueError, match=r"`run_eagerly=True` runs op by op, and `jit_compile=True` compiles"):
        trainer_of(run_eagerly=True, jit_compile=True)


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
def test_losses_that_are_no_means_over_examples_are_refused_with_micro_batches(reduction):
    text = rf"Micro-batches average losses by examples, which the reduction '{reduction}'"
    with pytest.raises(ValueError, match=text):
        trainer_of(loss=summed(reduction), microbatches=2)
    trainer_of(loss=summed(reduction))


def test_options_may_be_numpys():
    trainer_of(ema=np.float32(0.5), clip_norm=np.float64(1.0), microbatches=np.int8(2), seed=np.int64(3))


def test_names_that_keras_knows_pass():
    # A warning would be an error.
    for metric in ("accuracy", "acc", "ce", "crossentropy", "mae", "MeanSquaredError", "AUC"):
        trainer_of(loss="mse", metrics=[metric])
    for loss in ("mse", "MSE", "categorical_crossentropy", "KLDivergence", "huber"):
        trainer_of(loss=loss)
    trainer_of(loss=lambda y, p: tf.reduce_mean(y - p), metrics={"head": ["mae", "mse"]})
