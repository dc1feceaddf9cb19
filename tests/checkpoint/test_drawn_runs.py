"""Runs that Hypothesis draws, stops at drawn places, and has go on."""

import pathlib
import shutil
import tempfile

import hypothesis.strategies as st
import keras
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import tapeloop as tl
from tests.support import runs
from tests.support.recipes import thorough

EPOCHS = 3


class Stopped(RuleBasedStateMachine):
    """A program that is run again and again, each time until it is stopped, and once to its end."""

    @initialize(kind=st.sampled_from(sorted(runs.RUNS)), every=st.integers(1, 7), keep=st.integers(1, 3))
    def begin(self, kind, every, keep):
        self.kind, self.folder = kind, pathlib.Path(tempfile.mkdtemp())
        self.options = tl.Checkpoints(self.folder, every_steps=every, every_epochs=None, keep=keep)

    @rule(step=st.integers(1, 15))
    def run_until(self, step):
        with runs.interrupted_at(step):
            runs.RUNS[self.kind].fit(EPOCHS, self.options)

    @rule()
    def lose_the_newest(self):
        # As if the process had been killed before it was written.
        if len(list(self.folder.glob("0*-step-*"))) > 1:
            shutil.rmtree(self.options.newest)

    @rule()
    def save_and_load(self):
        """Load the newest into another trainer, and save it elsewhere: what is saved is the same again."""
        if self.options.newest is not None:
            trainer = runs.RUNS[self.kind].trainer()
            trainer.load(self.options.newest)
            before = runs.digest(trainer)
            trainer.save(self.folder / "copy")
            another = runs.RUNS[self.kind].trainer()
            another.load(self.folder / "copy")
            assert runs.digest(another) == before

    def teardown(self):
        if hasattr(self, "kind"):
            resumed = runs.digest(runs.RUNS[self.kind].fit(EPOCHS, self.options))
            assert resumed == runs.uninterrupted(self.kind, EPOCHS)
            shutil.rmtree(self.folder)
        keras.backend.clear_session()


# Each rule traces the steps of a whole program anew.
Stopped.TestCase.settings = settings(thorough(0.15), stateful_step_count=4)
TestDrawnRuns = Stopped.TestCase
