"""A model of numbered blocks."""

import keras


def blocks(count=4):
    layers = [keras.layers.Dense(3, name=f"block{index}") for index in range(count)]
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(3, name="stem"), *layers, keras.layers.Dense(1, name="head")]
    )
