"""Compiled steps, the loop in the graph, phases and epochs."""
