"""BYOL on handwritten digits without labels; a linear probe with 100 labels judges the encoder before and after."""

import keras
import tapeloop as tl
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

keras.utils.set_random_seed(0)
layers, ops = keras.layers, keras.ops
images, labels = load_digits().images[..., None] / 16, load_digits().target


class BYOL(tl.Trainer):
    def compute_loss(self, batch, training):
        views = self.model["augment"](ops.concatenate([batch, batch]), training=training)
        online = self.model["online"](views, training=training)
        target = self.model["target"](ops.concatenate(ops.split(views, 2)[::-1]))  # frozen: inference, no gradient
        return ops.mean(keras.losses.cosine_similarity(target, self.model["predictor"](online, training=training)))

    def train_step(self, batch):
        logs = super().train_step(batch)
        self.follow("target", "online", decay=0.98)
        return logs

    def probe(self):
        features = self.model["online"].layers[0].predict(images, verbose=0)
        return RidgeClassifier().fit(features[:100], labels[:100]).score(features[900:], labels[900:])


convolution = layers.Conv2D(32, 3, activation="relu")
encoder = keras.Sequential([keras.Input((8, 8, 1)), convolution, layers.Flatten(), layers.Dense(32)], name="encoder")
online = keras.Sequential([encoder, layers.Dense(128), layers.BatchNormalization(), layers.ReLU(), layers.Dense(32)])
predictor = keras.Sequential([layers.Dense(64), layers.BatchNormalization(), layers.ReLU(), layers.Dense(32)])
augment = keras.Sequential([layers.RandomTranslation(0.15, 0.15), layers.GaussianNoise(0.1)])
networks = {"online": online, "target": keras.models.clone_model(online), "predictor": predictor, "augment": augment}
byol = BYOL(networks, tl.Freeze("target"), optimizer=keras.optimizers.Adam(2e-3))
before = byol.probe()
byol.fit(images, batch_size=128, epochs=15, verbose=0)
print(f"linear probe: untrained encoder {before:.3f}, after BYOL {byol.probe():.3f}")
assert byol.probe() > before + 0.05
