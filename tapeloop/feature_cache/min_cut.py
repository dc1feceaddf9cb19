"""The lightest set of nodes of a graph that stands on every way from some nodes to others."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping

_Place = tuple[str, int]  # a node is two places, 0 where ways come in and 1 where they go out


def smallest_cut(
    weights: Mapping[str, float], edges: Iterable[tuple[str, str]], sources: Iterable[str], sinks: Iterable[str]
) -> set[str] | None:
    """Return the nodes of least weight in all without which no sink can be reached from a source.

    Where several sets weigh the least, it is the one nearest to the sinks.

    Args:
        weights: The weight of each node; infinite where it cannot be cut.
        edges: From one node to another.
        sources: Where ways begin; a source may be cut itself.
        sinks: Where they end; a sink may be cut itself.

    Returns:
        The nodes, or None where there is no such set of finite weight.

    Source: Edmonds and Karp, Theoretical improvements in algorithmic efficiency for network flow problems, 1972.
    """
    start, end = ("", 0), ("", 1)
    room: dict[_Place, dict[_Place, float]] = defaultdict(lambda: defaultdict(float))

    def connect(one: _Place, other: _Place, weight: float) -> None:
        room[one][other] += weight
        room[other][one] += 0.0

    for node, weight in weights.items():
        connect((node, 0), (node, 1), weight)
    for before, behind in edges:
        connect((before, 1), (behind, 0), math.inf)
    for node in sources:
        connect(start, (node, 0), math.inf)
    for node in sinks:
        connect((node, 1), end, math.inf)
    while (way := _way(room, start, end)) is not None:
        flow = min(room[one][other] for one, other in way)
        if math.isinf(flow):
            return None
        for one, other in way:
            room[one][other] -= flow
            room[other][one] += flow
    reaching = _reaching(room, end)
    return {node for node in weights if (node, 1) in reaching and (node, 0) not in reaching}


def _way(
    room: Mapping[_Place, Mapping[_Place, float]], start: _Place, end: _Place
) -> list[tuple[_Place, _Place]] | None:
    """Return a shortest way along which there is room, or None."""
    came: dict[_Place, _Place] = {start: start}
    waiting = deque([start])
    while waiting and end not in came:
        place = waiting.popleft()
        for other, left in room[place].items():
            if left > 0 and other not in came:
                came[other] = place
                waiting.append(other)
    if end not in came:
        return None
    way, place = [], end
    while place != start:
        way.append((came[place], place))
        place = came[place]
    return way


def _reaching(room: Mapping[_Place, Mapping[_Place, float]], end: _Place) -> set[_Place]:
    """Return the places from which there is a way to the end along which there is room."""
    found, waiting = {end}, [end]
    while waiting:
        place = waiting.pop()
        for other in room[place]:
            if other not in found and room[other][place] > 0:
                found.add(other)
                waiting.append(other)
    return found
