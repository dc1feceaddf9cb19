"""Transfer learning in two stages: a new head on a frozen backbone, then the head and the last block, more slowly."""

import keras
import tapeloop as tl
from sklearn.datasets import load_digits

keras.utils.set_random_seed(0)
layers = keras.layers
images, labels = load_digits(return_X_y=True)
images, low = images.reshape(-1, 8, 8, 1) / 16, labels < 5
x, y = images[~low], labels[~low] - 5  # 5 to 9; the backbone knows 0 to 4
x, y, x_test, y_test = x[:600], y[:600], x[600:], y[600:]

backbone = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(8, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.Conv2D(16, 3, activation="relu"),
        layers.Conv2D(32, 3, activation="relu"),
        layers.GlobalAveragePooling2D(),
    ],
    name="backbone",
)
options = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metrics": ["accuracy"]}
pretraining = tl.Trainer(keras.Sequential([backbone, layers.Dense(5)]), optimizer="adam", **options)
pretraining.fit(images[low], labels[low], epochs=10, verbose=0)

model = keras.Sequential([backbone, layers.Dense(5, name="head")])
trainer = tl.Trainer(model, optimizer="adam", **options)
accuracies = []
for policy, rate in [(tl.Freeze("backbone"), 1e-2), (tl.TrainOnly("head", tl.last(1, of=layers.Conv2D)), 1e-3)]:
    trainer.policy = policy
    trainer.learning_rates["default"] = rate
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, restore_best_weights=True)
    trainer.fit(x, y, epochs=30, validation_split=0.2, callbacks=[stopping], verbose=0)
    accuracies.append(trainer.evaluate(x_test, y_test, verbose=0)["accuracy"])

print(f"test accuracy: head only {accuracies[0]:.3f}, head and last block {accuracies[1]:.3f}")
assert accuracies[1] > max(0.93, accuracies[0] + 0.02)
