"""LoRA adapters learn digits upside down in a frozen base; they are saved alone, and loaded into a fresh base."""

import tempfile
from pathlib import Path

import keras
import tapeloop as tl
from sklearn.datasets import load_digits

folder = Path(tempfile.mkdtemp())
options = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"], "seed": 0}


def make_base():
    hidden = [keras.layers.Dense(128, activation="relu", name=f"hidden{number}") for number in (1, 2, 3)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, name="head")])


def make_adapted():
    base = make_base()
    base.load_weights(folder / "base.weights.h5")
    for layer in base.layers:
        layer.enable_lora(4)
    return tl.Trainer(base, tl.TrainOnly("**/lora_kernel_*"), optimizer=keras.optimizers.Adam(3e-3), **options)


keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
upright, turned = x / 16, x[:, ::-1] / 16
pretraining = tl.Trainer(make_base(), **options)
pretraining.fit(upright[:1300], y[:1300], epochs=10, verbose=0)
pretraining.save(folder / "base.weights.h5")
trainer, fresh = make_adapted(), make_adapted()
trainer.fit(turned[:1300], y[:1300], epochs=15, verbose=0)
trainer.save_trained(folder / "adapter.h5")
before = fresh.evaluate(turned[1300:], y[1300:], verbose=0)["accuracy"]
fresh.load_trained(folder / "adapter.h5")
after = fresh.evaluate(turned[1300:], y[1300:], verbose=0)["accuracy"]
print(f"upside down: base {before:.3f}, with the adapter {after:.3f}")
assert after > before + 0.3 and (fresh.predict(turned) == trainer.predict(turned)).all()
