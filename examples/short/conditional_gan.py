"""A conditional GAN of handwritten digits: two groups, an optimizer each. A classifier of real digits judges it."""

import keras
import tapeloop as tl
from sklearn.datasets import load_digits
from sklearn.svm import SVC

keras.utils.set_random_seed(0)
layers, ops = keras.layers, keras.ops
images, labels = load_digits().data / 16, load_digits().target


class ConditionalGAN(tl.Trainer):
    def forward(self, classes, training):
        noise = keras.random.normal((ops.shape(classes)[0], 16))
        return self.model["generator"](ops.hstack([noise, classes]), training=training)

    def loss_of(self, images, classes, sign):
        return ops.mean(ops.softplus(sign * self.model["discriminator"](ops.hstack([images, classes]), training=True)))

    def train_step(self, batch):
        images, classes = batch
        with self.tape("discriminator") as tape:
            d_loss = self.loss_of(images, classes, sign=-1) + self.loss_of(self.forward(classes, True), classes, sign=1)
        self.update(tape, d_loss)
        with self.tape("generator") as tape:
            g_loss = self.loss_of(self.forward(classes, True), classes, sign=-1)
        self.update(tape, g_loss)
        return {"d_loss": d_loss, "g_loss": g_loss}


generator = keras.Sequential([keras.Input((26,)), layers.Dense(128, "relu"), layers.Dense(64, "sigmoid")])
discriminator = keras.Sequential([keras.Input((74,)), layers.Dense(128, "relu"), layers.Dropout(0.3), layers.Dense(1)])
policy = tl.Groups({"generator": "generator", "discriminator": "discriminator"})
optimizers = {"generator": keras.optimizers.Adam(2e-3, 0.5), "discriminator": keras.optimizers.Adam(1e-3, 0.5)}
gan = ConditionalGAN({"generator": generator, "discriminator": discriminator}, policy, optimizer=optimizers)
gan.fit(images, keras.utils.to_categorical(labels), batch_size=64, epochs=40, verbose=0)
accuracy = SVC().fit(images, labels).score(gan.predict(keras.utils.to_categorical(labels)), labels)
print(f"samples that a classifier finds to be of the class asked for: {accuracy:.3f} (by chance 0.1)")
assert accuracy > 0.8
