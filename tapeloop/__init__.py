"""Train part of a TensorFlow/Keras 3 model, and pay only for that part."""

from tapeloop.errors import CacheError, DataError, DisconnectedError, NonFiniteError, PolicyError, TapeloopError
from tapeloop.history import History, Phase
from tapeloop.layerwise import LayerwiseDecay
from tapeloop.ordinal import first, last
from tapeloop.policy import Freeze, Groups, Progress, TrainAll, TrainOnly, VariablePolicy
from tapeloop.report import paths
from tapeloop.saving import Frontier
from tapeloop.schedule import Cycle, GradualUnfreeze, Phases, RandomSubset
from tapeloop.selection import Selection
from tapeloop.tape import GroupTape
from tapeloop.trainer import Trainer
from tapeloop.tree import SubmodelInfo, VariableInfo
from tapeloop.where import Where, glob, kind, matching, named, under

__all__ = [
    "CacheError",
    "Cycle",
    "DataError",
    "DisconnectedError",
    "Freeze",
    "Frontier",
    "GradualUnfreeze",
    "GroupTape",
    "Groups",
    "History",
    "LayerwiseDecay",
    "NonFiniteError",
    "Phase",
    "Phases",
    "PolicyError",
    "Progress",
    "RandomSubset",
    "Selection",
    "SubmodelInfo",
    "TapeloopError",
    "TrainAll",
    "TrainOnly",
    "Trainer",
    "VariableInfo",
    "VariablePolicy",
    "Where",
    "first",
    "glob",
    "kind",
    "last",
    "matching",
    "named",
    "paths",
    "under",
]

__version__ = "0.1.0"
