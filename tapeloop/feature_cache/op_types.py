"""The op types that the feature cache knows by name, with `READING` and `PYTHON` of `_backend/traced_graph.py`.

A stateful op that is in no list is never frozen, and the `CacheError` names its type. For stateless ops TensorFlow says
what they compute; whether they keep the examples of a batch apart is tried out by `IndependenceProbe`.
"""

# Ops whose outputs have as many rows as there are values of some kind, so that a row is no longer an example's.
PICKING = frozenset({"Where", "DynamicPartition", "ListDiff"})
# The same, but a later gather may bring the examples back: an embedding looks up each token that occurs once.
COUNTING = frozenset({"Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2"})
# Ops that look at the shape of a tensor and at no value.
SHAPES = frozenset({"Shape", "ShapeN", "Size", "Rank"})
# Stateful ops that draw random numbers, beside those with "Random" in their type.
DRAWING = frozenset({"TruncatedNormal", "Multinomial"})
