"""A sweep, learning rate x what trains, with the logs of each run in a folder of its own."""

import csv
import itertools
import tempfile
from pathlib import Path

import keras
import tapeloop as tl
from sklearn.datasets import load_digits

POLICIES = {"head": tl.TrainOnly("head"), "upper": tl.TrainOnly("head", "block2"), "all": tl.TrainAll()}
RATES = (1e-3, 1e-2)
runs, dense = Path(tempfile.mkdtemp()), keras.layers.Dense
options = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"], "seed": 0}

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x, low = x / 16, y < 5
blocks = [dense(64, activation="relu", name="block1"), dense(32, activation="relu", name="block2")]
model = keras.Sequential([keras.Input((64,)), *blocks, dense(5, name="head")])
tl.Trainer(model, **options).fit(x[low], y[low], epochs=10, verbose=0)
pretrained = model.get_weights()

for (name, policy), rate in itertools.product(POLICIES.items(), RATES):
    folder = runs / f"{name}-{rate:g}"
    folder.mkdir()
    model.set_weights(pretrained)
    trainer = tl.Trainer(model, policy, optimizer=keras.optimizers.Adam(rate), **options)
    logging = [keras.callbacks.CSVLogger(folder / "log.csv"), keras.callbacks.TensorBoard(folder)]
    trainer.fit(x[~low], y[~low] - 5, epochs=5, validation_split=0.25, callbacks=logging, verbose=0)

results = {}
for path in sorted(runs.glob("*/log.csv")):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    results[path.parent.name] = float(rows[-1]["val_accuracy"])
    print(f"{path.parent.name:12} {len(rows)} epochs  val_accuracy {results[path.parent.name]:.3f}")
assert len(results) == 6 and max(results.values()) > 0.9 > min(results.values()) + 0.2
assert all(list((runs / name).glob("train/events*")) for name in results)
