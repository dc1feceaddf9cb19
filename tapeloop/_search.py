"""Searching a graph: of ops, of classes, of places in a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def search(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> dict[Node, Node | None]:
    """Return the nodes that are reached from some, nearest first, each with the node before it; None before a start.

    Args:
        starts: Where the search begins.
        following: Gives the nodes that follow on a node.
    """
    came_from: dict[Node, Node | None] = dict.fromkeys(starts)
    # Breadth first: each node is reached on a shortest way, which says most in an error, and without which the number
    # of searches for a smallest cut would depend on the weights.
    waiting = deque(came_from)
    while waiting:
        node = waiting.popleft()
        for other in following(node):
            if other not in came_from:
                came_from[other] = node
                waiting.append(other)
    return came_from


def way_to(node: Node, came_from: Mapping[Node, Node | None]) -> list[Node]:
    """Return the way on which a search came to a node, from where it began."""
    way = [node]
    while (before := came_from[way[-1]]) is not None:
        way.append(before)
    return way[::-1]
