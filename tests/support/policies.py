"""A policy that notes when it is asked."""

import tapeloop as tl


class Asked(tl.VariablePolicy):
    """Answers with a function of the progress, and notes what it was asked with."""

    def __init__(self, answer=lambda progress: tl.TrainAll(), every=None):
        self.answer, self.every, self.seen = answer, every, []

    def at(self, progress):
        self.seen.append((progress.step, progress.epoch, dict(progress.logs)))
        return self.answer(progress)

    @property
    def steps(self):
        return [step for step, _, _ in self.seen]
