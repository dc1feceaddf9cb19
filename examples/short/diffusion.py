"""A denoising diffusion model (DDPM) of two moons, which samples from the moving average of its weights."""

import keras
import numpy as np
import tapeloop as tl
from sklearn.datasets import make_moons

keras.utils.set_random_seed(0)
layers, ops = keras.layers, keras.ops
betas = np.linspace(1e-3, 0.2, 50, dtype="float32")
kept = np.cumprod(1 - betas)  # how much of the signal's variance is left
data = 2 * make_moons(2000, noise=0.05, random_state=0)[0] - [1.0, 0.5]


class Diffusion(tl.Trainer):
    def compute_loss(self, batch, training):
        times = keras.random.randint(ops.shape(batch)[:1], 0, len(betas))
        noise, signal = keras.random.normal(ops.shape(batch)), ops.take(kept, times)[:, None]
        noisy = ops.sqrt(signal) * batch + ops.sqrt(1 - signal) * noise
        return ops.mean((self.forward([noisy, times], training) - noise) ** 2)

    def sample(self, count):
        points = keras.random.normal((count, 2))
        for time, beta in reversed(list(enumerate(betas))):
            noise = self.model([points, ops.full((count,), time)])
            points = (points - beta / np.sqrt(1 - kept[time]) * noise) / np.sqrt(1 - beta)
            points += np.sqrt(beta) * (time > 0) * keras.random.normal((count, 2))
        return np.array(points)


point, time = keras.Input((2,)), keras.Input((), dtype="int32")
hidden = ops.silu(layers.Dense(128)(point) + layers.Embedding(len(betas), 128, "glorot_uniform")(time))
noise = layers.Dense(2)(layers.Dense(128, activation="silu")(layers.Dense(128, activation="silu")(hidden)))
diffusion = Diffusion(keras.Model([point, time], noise), optimizer=keras.optimizers.Adam(1e-2), ema=0.995)
diffusion.fit(data, batch_size=128, epochs=100, verbose=0)
with diffusion.ema_weights():
    distances = np.linalg.norm(diffusion.sample(500)[:, None] - data, axis=-1)
fidelity, coverage = distances.min(axis=1).mean(), distances.min(axis=0).mean()
print(f"mean distance from a sample to the data {fidelity:.3f}, from the data to a sample {coverage:.3f}")
assert fidelity < 0.2 and coverage < 0.15
