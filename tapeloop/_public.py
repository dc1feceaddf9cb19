"""The public names, which `tapeloop` gives out; users import them from there."""

from __future__ import annotations

from tapeloop.callbacks.keras_callbacks import ForGroup
from tapeloop.checkpoint.checkpoints import Checkpoints
from tapeloop.dry_run import DryPhase, DryRun
from tapeloop.errors import (
    CacheError,
    CheckpointError,
    DataError,
    DisconnectedError,
    NonFiniteError,
    PolicyError,
    TapeloopError,
    WorkerError,
)
from tapeloop.feature_cache.report import Frontier
from tapeloop.learning_rate_search.search import LearningRateSearch, find_learning_rate
from tapeloop.loop.history import History, Phase
from tapeloop.model.filters import Filter, first, glob, last, matching, named, of_type, under
from tapeloop.model.selection import Selection
from tapeloop.model.summary import paths
from tapeloop.model.tree import SubmodelInfo, VariableInfo
from tapeloop.optimization.tape import GroupTape
from tapeloop.policies.base import Progress, VariablePolicy
from tapeloop.policies.layerwise import LayerwiseDecay
from tapeloop.policies.scheduled import Cycle, GradualUnfreeze, Phases, RandomSubset
from tapeloop.policies.static import Freeze, Groups, TrainAll, TrainOnly
from tapeloop.trainer import Trainer
from tapeloop.tuning.report import Tuning, TuningRow

__all__ = [
    "CacheError",
    "CheckpointError",
    "Checkpoints",
    "Cycle",
    "DataError",
    "DisconnectedError",
    "DryPhase",
    "DryRun",
    "Filter",
    "ForGroup",
    "Freeze",
    "Frontier",
    "GradualUnfreeze",
    "GroupTape",
    "Groups",
    "History",
    "LayerwiseDecay",
    "LearningRateSearch",
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
    "Tuning",
    "TuningRow",
    "VariableInfo",
    "VariablePolicy",
    "WorkerError",
    "find_learning_rate",
    "first",
    "glob",
    "last",
    "matching",
    "named",
    "of_type",
    "paths",
    "under",
]
