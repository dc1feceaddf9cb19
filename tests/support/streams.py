"""Python iterables as data, some of which break."""

import keras
import numpy as np

from tapeloop.data.loader import DataSpec
from tests.support.models import trainer_of

layers = keras.layers
X, Y = np.ones((4, 5), "float32"), np.zeros(4, "int64")


def network():
    return keras.Sequential([keras.Input((5,)), layers.Dense(3)])


def trainer_on(data, model=None, **options):
    trainer = trainer_of(model or network(), optimizer="sgd", **options)
    trainer.fit(data, verbose=0)
    return trainer


def breaking(number, error, batch=(X, Y)):
    for _ in range(number):
        yield batch
    raise error


def from_pydataset(number, error, batch=(X, Y), **options):
    class Breaking(keras.utils.PyDataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            if index >= number:
                raise error
            return batch

    return Breaking(**options)


def loader_of(data, sampler=None, *, name="data", **options):
    return DataSpec(name, data, **options).loader(sampler)
