"""A frozen ResNet50 as a feature extractor under a ten-class head.

    python examples/feature_extraction.py [--weights imagenet] [--steps 5]

The backbone has random weights unless `--weights imagenet` loads the real ones, which needs a network once. The data is
made here: ten colours, told apart through the backbone's features by the head alone. These are computed once.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tapeloop as tl


def make_model(weights: str | None, size: int) -> keras.Model:
    """Nest the backbone under a head. Nothing is said about freezing here: that is the policy's to say."""
    backbone = keras.applications.ResNet50(
        include_top=False, weights=weights, input_shape=(size, size, 3), pooling="avg"
    )
    backbone.name = "backbone"
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(backbone(inputs)))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=None, help="'imagenet', or a file; random by default")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="steps of each of five epochs")
    args = parser.parse_args(arguments)

    keras.utils.set_random_seed(0)
    colours = np.random.uniform(-2, 2, (10, 1, 1, 3))
    y = np.arange(8 * args.steps) % 10
    x = colours[y] + np.random.normal(scale=0.1, size=(len(y), args.size, args.size, 3))

    model = make_model(args.weights, args.size)
    trainer = tl.Trainer(
        model,
        tl.Freeze("backbone"),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(0.1),
        metrics=["accuracy"],
        seed=0,
    )
    print(trainer.explain(depth=1))
    before = [value.copy() for value in model.get_layer("backbone").get_weights()]
    print(trainer.frontier((x, y), batch_size=8))
    history = trainer.fit((x, y), epochs=5, batch_size=8, feature_cache="memory").history
    after = model.get_layer("backbone").get_weights()
    assert all(np.array_equal(one, other) for one, other in zip(before, after)), "the backbone has moved"
    print("the backbone, batch statistics included, is bit-identical")
    return {name: values[-1] for name, values in history.items()}


if __name__ == "__main__":
    main()
