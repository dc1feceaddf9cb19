"""Train part of a TensorFlow/Keras 3 model, and pay only for that part."""

from tapeloop.errors import DataError, DisconnectedError, PolicyError, TapeloopError
from tapeloop.loop import History
from tapeloop.policy import Freeze, Groups, TrainAll, TrainOnly, VariablePolicy
from tapeloop.selection import Selection
from tapeloop.step import GroupTape
from tapeloop.trainer import Trainer
from tapeloop.tree import SubmodelInfo, VariableInfo
from tapeloop.where import Where, glob, kind, matching, named, under

__all__ = [
    "DataError",
    "DisconnectedError",
    "Freeze",
    "GroupTape",
    "Groups",
    "History",
    "PolicyError",
    "Selection",
    "SubmodelInfo",
    "TapeloopError",
    "TrainAll",
    "TrainOnly",
    "Trainer",
    "VariableInfo",
    "VariablePolicy",
    "Where",
    "glob",
    "kind",
    "matching",
    "named",
    "under",
]

__version__ = "0.1.0"
