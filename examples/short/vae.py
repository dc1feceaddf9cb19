"""A variational autoencoder of handwritten digits, whose KL weight rises from 0 to 1 over the first steps."""

import keras
import tapeloop as tl
from sklearn.datasets import load_digits

keras.utils.set_random_seed(0)
layers, ops = keras.layers, keras.ops
CODE, ANNEALING = 8, 500
images = load_digits().data.astype("float32") / 16
train, test = images[:1500], images[1500:]


class VAE(tl.Trainer):
    def compute_loss(self, batch, training):
        mean, log_variance = ops.split(self.model["encoder"](batch, training=training), 2, axis=-1)
        noise = keras.random.normal(ops.shape(mean), seed=self.noise)
        logits = self.model["decoder"](mean + ops.exp(log_variance / 2) * noise, training=training)
        reconstruction = ops.mean(ops.sum(ops.binary_crossentropy(batch, logits, from_logits=True), axis=-1))
        kl = ops.mean(ops.sum(ops.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)) / 2
        weight = ops.minimum(ops.cast(self.step, "float32") / ANNEALING, 1.0)
        logs = {"kl_weight": weight, "kl": kl, "negative_elbo": reconstruction + kl}
        return reconstruction + weight * kl, logs


networks = {
    "encoder": keras.Sequential([keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(2 * CODE)]),
    "decoder": keras.Sequential([keras.Input((CODE,)), layers.Dense(128, activation="relu"), layers.Dense(64)]),
}
vae = VAE(networks, optimizer=keras.optimizers.Adam(2e-3))
vae.noise = keras.random.SeedGenerator(0)  # held by the trainer, and saved with it

before = vae.evaluate(test, verbose=0)
weights = vae.fit(train, batch_size=64, epochs=60, verbose=0).history["kl_weight"]
after = vae.evaluate(test, verbose=0)
print(f"negative ELBO on test images: {before['negative_elbo']:.1f} before, {after['negative_elbo']:.1f} after")
assert weights[0] < 0.1 and weights[-1] == 1.0
assert after["negative_elbo"] < before["negative_elbo"] - 10 and after["kl"] > 3
