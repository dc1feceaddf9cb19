"""The lightest set of nodes of a graph that stands on every way from some nodes to others."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from tapeloop._search import search, way_to

_Place = tuple[str, str]  # a node is two places: edges end in one and begin in the other


def smallest_cut(
    weights: Mapping[str, float], edges: Iterable[tuple[str, str]], sources: Iterable[str], sinks: Iterable[str]
) -> set[str] | None:
    """Return the nodes of least total weight without which no sink can be reached from a source.

    If several sets weigh the least, the set nearest to the sinks is returned.

    Args:
        weights: The weight of each node; infinite if it cannot be cut.
        edges: Pairs of nodes, from the first to the second.
        sources: Where ways begin; a source may be cut itself.
        sinks: Where ways end; a sink may be cut itself.

    Returns:
        The nodes, or None if there is no such set of finite weight.

    Source: Edmonds and Karp, Theoretical improvements in algorithmic efficiency for network flow problems, 1972.
    """
    # The flow runs from the sinks to the sources: what the last search still reaches is the side of the sinks.
    capacity: dict[_Place, dict[_Place, float]] = defaultdict(lambda: defaultdict(float))
    start, end = ("", "sinks"), ("", "sources")
    # Only the edge within a node can be cut, as all others have room without end.
    pairs = [((node, "out"), (node, "in"), weight) for node, weight in weights.items()]
    pairs += [((after, "in"), (before, "out"), math.inf) for before, after in edges]
    pairs += [(start, (node, "out"), math.inf) for node in sinks]
    pairs += [((node, "in"), end, math.inf) for node in sources]
    for one, other, weight in pairs:
        capacity[one][other] += weight
        capacity[other][one] += 0.0  # the way back must exist for flow to be taken back

    def following(place: _Place) -> list[_Place]:
        return [other for other, left in capacity[place].items() if left > 0]

    while end in (came_from := search([start], following)):
        way = list(itertools.pairwise(way_to(end, came_from)))
        flow = min(capacity[one][other] for one, other in way)
        if math.isinf(flow):
            return None
        for one, other in way:
            capacity[one][other] -= flow
            capacity[other][one] += flow
    return {node for node in weights if (node, "out") in came_from and (node, "in") not in came_from}
