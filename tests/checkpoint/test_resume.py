"""A run that is stopped and goes on comes to the same as one that was not, bit for bit."""

import pytest

from tests.support import runs
from tests.support.params import params

# In the middle of an epoch and at its end; where what trains changes, in each of its phases.
STOPS = dict.fromkeys(runs.RUNS, (2, (3, 5))) | dict.fromkeys(
    ("gradual", "cycle", "random", "drawn"), (3, (2, 5, 8, 11))
)

# Other spellings of what the rest try: `make test-all` runs them.
SLOW = {"unhashable", "portions", "dataset portions", "iterated", "pydataset"}
SLOW |= {"adversarial", "cycle", "float16", "groups", "microbatches", "random"}
SLOW |= {"counting", "dataset", "drawn"}


@pytest.mark.parametrize("kind", params(STOPS, SLOW))
def test_a_run_goes_on_bit_for_bit(kind, tmp_path):
    epochs, stops = STOPS[kind]
    for step in stops:
        with runs.interrupted_at(step):
            runs.RUNS[kind].fit(epochs, tmp_path)
    resumed = runs.digest(runs.RUNS[kind].fit(epochs, tmp_path))
    expected = runs.uninterrupted(kind, epochs)
    assert {name: resumed[name] for name in resumed if resumed[name] != expected.get(name)} == {}
    assert resumed.keys() == expected.keys()
