from tapeloop.loop.steps_per_call import Pace


def run(pace, seconds_of_step, calls, overhead=0.0, most=None):
    """The numbers of steps in so many calls."""
    numbers = []
    for _ in range(calls):
        steps = pace.steps if most is None else min(pace.steps, most)
        numbers.append(steps)
        pace.adapt(steps, overhead + steps * seconds_of_step)
    return numbers


def test_calls_grow_until_they_last_a_fifth_of_a_second():
    assert run(Pace("auto"), 0.001, 6) == [1, 8, 64, 200, 200, 200]
    assert run(Pace("auto"), 0.3, 3) == [1, 1, 1]


def test_a_first_call_that_compiles_holds_nothing_up():
    pace = Pace("auto")
    pace.adapt(1, 2.0)
    assert run(pace, 0.001, 4) == [1, 8, 64, 200]


def test_slower_steps_make_shorter_calls():
    pace = Pace("auto")
    run(pace, 0.001, 6)
    assert run(pace, 0.01, 3) == [200, 20, 20]


def test_a_call_that_an_event_cut_short_says_nothing():
    pace = Pace("auto")
    run(pace, 0.001, 6)
    assert run(pace, 0.001, 3, overhead=0.1, most=3) == [3, 3, 3]
    assert pace.steps == 200
    pace.adapt(3, 0.6)  # but when it was long all the same
    assert pace.steps == 1


def test_a_call_without_steps_says_nothing():
    pace = Pace("auto")
    run(pace, 0.001, 6)
    pace.adapt(0, 0.5)
    assert pace.steps == 200


def test_a_number_that_was_asked_for_stays():
    assert run(Pace(7), 0.001, 3) == [7, 7, 7]
