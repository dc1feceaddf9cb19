"""What a trainer and its model have come to, its private parts included."""

import numpy as np

from tests.support import models


def everything(trainer):
    """The bytes of all that a run leaves behind: the model, the optimizers' state and step counts, the averages."""
    state = [v for cohort in trainer._updates.optimizers.cohorts for v in cohort.optimizer.variables]
    averages = trainer._updates.averages.held(trainer.selection.trained)
    values = [np.asarray(value).tobytes() for value in (*state, *averages)]
    return models.values(trainer.model), values, trainer.step
