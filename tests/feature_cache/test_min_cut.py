"""The lightest cut, beside all cuts tried one by one."""

import itertools
import math

import hypothesis
from hypothesis import strategies as st

from tapeloop.feature_cache.min_cut import smallest_cut


def reaches(edges, sources, sinks, cut):
    found, waiting = set(), [node for node in sources if node not in cut]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [other for one, other in edges if one == node and other not in cut]
    return bool(found & set(sinks))


@st.composite
def graphs(draw):
    nodes = "abcdef"[: draw(st.integers(1, 6))]
    weights = {node: draw(st.sampled_from([1.0, 2.0, 5.0, math.inf])) for node in nodes}
    edges = draw(st.lists(st.sampled_from(list(itertools.product(nodes, nodes))), max_size=12))
    edges = [(one, other) for one, other in edges if one < other]
    some = st.lists(st.sampled_from(nodes), min_size=1, max_size=2)
    return weights, edges, draw(some), draw(some)


@hypothesis.given(graphs())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_cut_is_one_and_none_is_lighter(graph):
    weights, edges, sources, sinks = graph
    subsets = [set(some) for n in range(len(weights) + 1) for some in itertools.combinations(weights, n)]
    cuts = [sum(weights[node] for node in some) for some in subsets if not reaches(edges, sources, sinks, some)]
    found = smallest_cut(weights, edges, sources, sinks)
    if found is None:
        assert math.isinf(min(cuts))
    else:
        assert not reaches(edges, sources, sinks, found)
        assert sum(weights[node] for node in found) == min(cuts)


def test_of_equal_cuts_the_one_nearest_to_the_sinks_is_taken():
    assert smallest_cut({"a": 1.0, "b": 1.0, "c": 2.0}, [("a", "b"), ("b", "c")], ["a"], ["c"]) == {"b"}
    assert smallest_cut({"a": 1.0, "b": 1.0}, [("a", "b")], ["a"], ["b"]) == {"b"}
