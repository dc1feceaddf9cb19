"""A traced function taken apart: what its ops read and write, and functions made of parts of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tapeloop._backend.tracing import effects, is_stateful

READING = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"})
PYTHON = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc"})  # of whose code a graph holds a number alone


class TracedGraph:
    """The graph of a traced function.

    Attributes:
        function: The function, as `tf.function` traced it.
        ops: Its ops, each after those that it takes something from.
        batch: Its inputs that stand for what it is called with, composite ones in their parts.
        shapes: The names of those of them that are the shapes of sparse tensors.
        captures: What it takes from outside, by the name of the input that stands for it.
        variables: Those of the captures that are variables, likewise.
        outputs: Its outputs.
        effects: The ops that run whether or not an output needs them.
        definition: All of it, as a protocol buffer.
    """

    def __init__(self, function: Any, variables: Iterable[tf.Variable]) -> None:
        """Take a function apart.

        Args:
            function: A concrete function.
            variables: The variables to look for among its captures, beside those that it tells of itself.
        """
        self.function = function
        self.ops: list[tf.Operation] = function.graph.get_operations()
        given = len(function.inputs) - len(function.captured_inputs)
        self.batch: list[tf.Tensor] = list(function.inputs[:given])
        self.shapes = set(_sparse_shapes(function, self.batch))
        self.captures = {inner.name: outer for inner, outer in zip(function.inputs[given:], function.captured_inputs)}
        handles = {id(variable.handle): variable for variable in (*function.variables, *variables)}
        self.variables = {name: handles[id(outer)] for name, outer in self.captures.items() if id(outer) in handles}
        self.outputs: list[tf.Tensor] = list(function.outputs)
        self.effects = effects(function)
        self.definition = function.graph.as_graph_def()
        self._nodes = {node.name: node for node in self.definition.node}
        self._functions = {inner.signature.name: inner for inner in self.definition.library.function}
        self._pure: dict[str, bool] = {}

    def is_pure(self, op: tf.Operation) -> bool:
        """Tell whether an op only computes something of what it takes and of the variables that it reads."""
        if op.type in READING or (op.type not in PYTHON and not op.op_def.is_stateful and not self._calls(op)):
            return True
        called = _called(self._nodes[op.name])
        return bool(called) and all(map(self._is_pure_function, called))

    def written(self) -> set[str]:
        """Return which captures, by name, an op may assign to."""
        handles = [(op, given.name) for op in self.ops for given in op.inputs if given.dtype == tf.resource]
        return {name for op, name in handles if name in self.captures and not self.is_pure(op)}

    def part(
        self, targets: Sequence[tf.Tensor], feeds: Sequence[tf.Tensor], effects: Collection[tf.Operation]
    ) -> Subgraph:
        """Return what computes some tensors from others.

        Args:
            targets: What is computed.
            feeds: From what, beside the captures.
            effects: Ops that are to run, too.

        Raises:
            ValueError: It takes an input of the function that is not among the feeds.
        """
        fed = {feed.name for feed in feeds}
        found: dict[str, tf.Operation] = {}
        used: set[str] = set()
        waiting = [*effects, *(target.op for target in targets if target.name not in fed)]
        used |= {target.name for target in targets if target.name in fed}
        while waiting:
            op = waiting.pop()
            if op.name in found:
                continue
            if op.outputs and op.outputs[0].name in self.captures:
                used.add(op.outputs[0].name)
                continue
            if any(op is given.op for given in self.batch):
                raise ValueError(
                    f"What is computed of {[feed.name for feed in feeds]} takes the input `{op.name}` too."
                )
            found[op.name] = op
            for given in op.inputs:
                if given.name in fed or given.name in self.captures:
                    used.add(given.name)
                else:
                    waiting.append(given.op)
            waiting += [before for before in op.control_inputs if before.type == "NoOp"]  # an order goes through it
        nodes = [node for node in self.definition.node if node.name in found]
        return Subgraph(self, nodes, list(targets), list(feeds), used)

    def _calls(self, op: tf.Operation) -> bool:
        return bool(_called(self._nodes[op.name]))

    def _is_pure_function(self, name: str) -> bool:
        if name not in self._pure:
            self._pure[name] = True  # where it calls itself
            self._pure[name] = all(map(self._is_pure_node, self._functions[name].node_def))
        return self._pure[name]

    def _is_pure_node(self, node: Any) -> bool:
        called = [node.op] if node.op in self._functions else _called(node)
        if called:
            return all(map(self._is_pure_function, called))
        return node.op in READING or (node.op not in PYTHON and not is_stateful(node.op))


class Subgraph:
    """Part of a traced function, to be called in another.

    Attributes:
        captures: The names of the captures that it takes.
    """

    def __init__(
        self,
        whole: TracedGraph,
        nodes: Sequence[Any],
        targets: Sequence[tf.Tensor],
        feeds: Sequence[tf.Tensor],
        used: set[str],
    ) -> None:
        self.captures = [name for name in whole.captures if name in used]
        self._whole = whole
        self._targets = targets
        self._feeds = feeds
        self._used = used
        names = {node.name for node in nodes}
        self._graph = tf.compat.v1.GraphDef(versions=whole.definition.versions, library=whole.definition.library)
        for node in nodes:
            copy = self._graph.node.add()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(given for given in node.input if given[0] != "^" or given[1:] in names)
            copy.attr.pop("_class", None)  # says which others it is to be on a device with

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables among its captures."""
        return [self._whole.variables[name] for name in self.captures if name in self._whole.variables]

    def function(self) -> Any:
        """Return a compiled function that computes it of values for what it is computed from.

        It is traced by itself, hence also while another thread has functions run eagerly.
        """
        specs = [tf.TensorSpec(feed.shape, feed.dtype) for feed in self._feeds]
        return tf.function(lambda *values: self(values), autograph=False).get_concrete_function(*specs)

    def __call__(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Add it to the graph that is being traced, with values for what it is computed from."""
        given = {feed.name: value for feed, value in zip(self._feeds, values)}
        graph = tf.compat.v1.get_default_graph()
        mapped = {name: value for name, value in given.items() if name in self._used}
        mapped |= {name: graph.capture(self._whole.captures[name]) for name in self.captures}
        wanted = [target.name for target in self._targets if target.name not in mapped]
        taken = {name.removeprefix("^") for node in self._graph.node for name in node.input}
        mapping = {n: v for n, v in mapped.items() if n in taken or n.removesuffix(":0") in taken}
        results = tf.graph_util.import_graph_def(self._graph, mapping, wanted, name="part")
        computed = dict(zip(wanted, results or []))
        return [computed[target.name] if target.name in computed else mapped[target.name] for target in self._targets]

    def described(self, labels: Mapping[str, str]) -> str:
        """Return what it computes, in a text that is the same for the same computation.

        The names of nodes and of functions, of which TensorFlow counts up some, are left out of it.

        Args:
            labels: What to write for its feeds and captures, by name.
        """
        functions = {inner.signature.name: inner for inner in self._graph.library.function}
        outside = {name.removesuffix(":0"): label for name, label in labels.items()}
        places = {node.name: number for number, node in enumerate(self._graph.node)}
        computed = [f"{places.get(target.op.name, target.name)}:{target.value_index}" for target in self._targets]
        return repr((_plain(self._graph.node, functions, {}, outside), computed))


def _sparse_shapes(function: Any, inputs: Sequence[tf.Tensor]) -> Iterator[str]:
    following = iter(inputs)
    for spec in tf.nest.flatten(function.structured_input_signature):
        if isinstance(spec, tf.TypeSpec):
            parts = [next(following) for _ in tf.nest.flatten(spec, expand_composites=True)]
            if isinstance(spec, tf.SparseTensorSpec):
                yield parts[2].name


def _called(node: Any) -> list[str]:
    """Return the names of the functions that a node calls."""
    found = [attr.func.name for attr in node.attr.values() if attr.HasField("func")]
    return found + [func.name for attr in node.attr.values() for func in attr.list.func]


def _plain(
    nodes: Iterable[Any], functions: Mapping[str, Any], known: dict[str, Any], outside: Mapping[str, str]
) -> Any:
    """Return nodes as nested tuples, with numbers for their names and the contents of functions for theirs."""
    nodes = list(nodes)
    numbers = {node.name: str(number) for number, node in enumerate(nodes)}

    def function(name: str) -> Any:
        if name not in known:
            known[name] = ()  # where it calls itself
            inner = functions[name]
            arguments = {argument.name: f"argument {n}" for n, argument in enumerate(inner.signature.input_arg)}
            returned = sorted(inner.ret.items())
            known[name] = (_plain(inner.node_def, functions, known, arguments), [given for _, given in returned])
        return known[name]

    def value(attr: Any) -> Any:
        if attr.HasField("func"):
            return function(attr.func.name)
        if attr.list.func:
            return [function(func.name) for func in attr.list.func]
        return attr.SerializeToString(deterministic=True)

    def taken(name: str) -> tuple[str, str]:
        node, _, port = name.partition(":")
        return numbers.get(node, outside.get(node, node)), port

    return [
        (
            function(node.op) if node.op in functions else node.op,
            [taken(name) for name in node.input if name[0] != "^"],
            [(key, value(attr)) for key, attr in sorted(node.attr.items()) if key[0] != "_"],
        )
        for node in nodes
    ]
