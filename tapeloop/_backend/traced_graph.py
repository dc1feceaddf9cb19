"""A traced function taken apart: what its ops read and write, and functions made of parts of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tapeloop._backend.tracing import effects, is_stateful, may_act
from tapeloop._search import search

# Stateful ops that only read a variable. An op type that is stateful and not listed here counts as writing.
READING = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape"})
# Ops that call Python. A graph holds only a number for their code, so nobody can tell what it does.
PYTHON = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc"})
# Ops whose output is what they take, seen in another way, and ops that may write into what they take.
VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"})
ELEMENTWISE = frozenset(
    {"Add", "AddV2", "BiasAdd", "Elu", "EluGrad", "Maximum", "Minimum", "Mul", "Neg", "RealDiv", "Relu", "Relu6"}
    | {"Relu6Grad", "ReluGrad", "Rsqrt", "Sigmoid", "SigmoidGrad", "Softmax", "Square", "Sub", "Tanh", "TanhGrad"}
)
# Ops on resources or stateful ones that leave nothing behind but the values of variables, and where a generator of
# random numbers stands that belongs to the op.
_ON_VARIABLES = re.compile(
    r"Resource\w+|Assign\w*VariableOp|ReadVariableOp|VariableShape|VarHandleOp|VarIsInitializedOp|LookupTable(Find|Size)V2"
    r"|Random\w+|Multinomial|ParameterizedTruncatedNormal|Rng\w+|Stateful\w*(Uniform|Normal|Binomial)\w*|CudnnRNN\w*"
    r"|Assert|While|If|Case|StatefulPartitionedCall"
)


class TracedGraph:
    """The graph of a traced function.

    Attributes:
        function: The function, as `tf.function` traced it.
        ops: Its ops, each after the ops whose outputs it takes.
        inputs: The tensors that stand for its arguments, composite ones in their parts.
        sparse_shapes: The names of those inputs that are the dense shapes of sparse tensors.
        captures: What the function takes from outside, by the name of the tensor that stands for it inside.
        variables: Those captures that are variables, by the same names.
        outputs: Its outputs.
        effects: The ops that run whether or not an output needs them.
        definition: The whole graph as a protocol buffer.
    """

    def __init__(self, function: Any, variables: Iterable[tf.Variable]) -> None:
        """Take a function apart.

        Args:
            function: A concrete function.
            variables: Variables to look for among its captures, beside `function.variables`, which omits those that
                are only assigned to.
        """
        self.function = function
        self.ops: list[tf.Operation] = function.graph.get_operations()
        count = len(function.inputs) - len(function.captured_inputs)
        self.inputs: list[tf.Tensor] = list(function.inputs[:count])
        self.sparse_shapes = set(_sparse_shapes(function, self.inputs))
        # `captured_inputs` are the tensors outside, in the order of the last inputs. A variable is captured as its
        # handle, the very tensor object that `variable.handle` returns.
        self.captures = {inner.name: outer for inner, outer in zip(function.inputs[count:], function.captured_inputs)}
        handles = {id(variable.handle): variable for variable in (*function.variables, *variables)}
        self.variables = {name: handles[id(outer)] for name, outer in self.captures.items() if id(outer) in handles}
        self.outputs: list[tf.Tensor] = list(function.outputs)
        self.effects = effects(function)
        self.definition = function.graph.as_graph_def()
        self._nodes = {node.name: node for node in self.definition.node}
        self._functions = {inner.signature.name: inner for inner in self.definition.library.function}
        self._pure_functions: dict[str, bool] = {}
        self._assigning: dict[str, set[int]] = {}

    @property
    def calls_python(self) -> bool:
        """Whether an op calls Python, in the function or in one that it calls."""
        inner = (node for function in self._functions.values() for node in function.node_def)
        return any(node.op in PYTHON for node in itertools.chain(self.definition.node, inner))

    def is_pure(self, op: tf.Operation) -> bool:
        """Tell whether an op only computes something from its inputs and the variables that it reads."""
        return self._is_pure_node(self._nodes[op.name])

    def written(self) -> set[str]:
        """Return the names of the captures that an op may assign to."""
        handles = [(op, taken.name) for op in self.ops for taken in op.inputs if taken.dtype == tf.resource]
        return {name for op, name in handles if name in self.captures and not self.is_pure(op)}

    def assigned(self) -> set[str]:
        """Return the names of the captures that an op may assign to, in the function or in one that it calls.

        Unlike `written`, which takes all that a call is given for assigned to if the call assigns to anything.
        """
        found = set[str]()
        for op in self.ops:
            places = self._assigned_inputs(self._nodes[op.name])
            found |= {op.inputs[place].name for place in places if op.inputs[place].dtype == tf.resource}
        return found & self.captures.keys()

    def _assigned_inputs(self, node: Any) -> set[int]:
        """Return which of a node's inputs it may assign to, by their places: no more than those that are resources."""
        called = [node.op] if node.op in self._functions else _called(node)
        given = [name for name in node.input if not name.startswith("^")]
        if not called:
            return set() if self._is_pure_node(node) else set(range(len(given)))
        # What a branch goes by comes before what the branches are given.
        first = int(node.op in ("If", "StatelessIf", "Case", "StatelessCase"))
        return {first + place for name in called for place in self._assigned_arguments(name)}

    def _assigned_arguments(self, name: str) -> set[int]:
        """Return which of its arguments a function may assign to, by their places."""
        if name not in self._assigning:
            function = self._functions[name]
            places = {argument.name: place for place, argument in enumerate(function.signature.input_arg)}
            found = set[int]()
            for node in function.node_def:
                given = [each for each in node.input if not each.startswith("^")]
                found |= {places[given[at]] for at in self._assigned_inputs(node) if given[at] in places}
            self._assigning[name] = found
        return self._assigning[name]

    def subgraph(
        self, targets: Sequence[tf.Tensor], feeds: Sequence[tf.Tensor], effects: Collection[tf.Operation] = ()
    ) -> Subgraph:
        """Return the part of the graph that computes some tensors from others.

        Args:
            targets: The tensors to compute.
            feeds: The tensors to compute them from, beside the captures.
            effects: Ops that are to run as well.

        Raises:
            ValueError: The targets need an input of the function that is not among the feeds.
        """
        # Tensors are compared by name, as `==` on them compares their elements.
        sources = {feed.name for feed in feeds} | self.captures.keys()

        def behind(op: tf.Operation) -> list[tf.Operation]:
            # TensorFlow orders ops by control edges, often through a NoOp that joins several.
            joined = [before for before in op.control_inputs if before.type == "NoOp"]
            return joined + [taken.op for taken in op.inputs if taken.name not in sources]

        ops = search([*effects, *(target.op for target in targets if target.name not in sources)], behind)
        found = {op.name for op in ops}
        missing = [given.op.name for given in self.inputs if given.op.name in found]
        if missing:
            raise ValueError(f"What is computed of {[feed.name for feed in feeds]} takes the input `{missing[0]}` too.")
        used = {taken.name for taken in (*targets, *(taken for op in ops for taken in op.inputs))} & sources
        # `tf.compat.v1.wrap_function(...).prune` would cut a graph too, but traces without automatic control
        # dependencies: seeds, statistics and metrics in what is left of a step would run in no order.
        definition = tf.compat.v1.GraphDef(versions=self.definition.versions, library=self.definition.library)
        definition.node.extend(node for node in self.definition.node if node.name in found)
        for node in definition.node:
            kept = [taken for taken in node.input if taken[0] != "^" or taken[1:] in found]
            del node.input[:]
            node.input.extend(kept)
            node.attr.pop("_class", None)  # names other nodes to share a device with, which may be missing here
        return Subgraph([name for name in self.captures if name in used], self, definition, targets, feeds)

    def edited(self, nodes: Mapping[str, Any], feeds: Sequence[Any], effects: Collection[tf.Operation]) -> Subgraph:
        """Return what other nodes make of the function: whatever its outputs and some effects need of them.

        Args:
            nodes: The nodes by name, as protocol buffers: those of a subgraph, changed.
            feeds: What stands for the values that are fed, beside the captures: its `name` is that of a tensor.
            effects: The ops that are to run as well.
        """

        def behind(name: str) -> list[str]:
            taken = [given.lstrip("^").partition(":")[0] for given in nodes[name].input if _is_data(given, nodes)]
            return [before for before in taken if before in nodes]

        starts = [op.name for op in (*effects, *(output.op for output in self.outputs)) if op.name in nodes]
        found = search(starts, behind)
        definition = tf.compat.v1.GraphDef(versions=self.definition.versions, library=self.definition.library)
        definition.node.extend(nodes[name] for name in nodes if name in found)
        for node in definition.node:
            kept = [taken for taken in node.input if taken[0] != "^" or taken[1:] in found]
            del node.input[:]
            node.input.extend(kept)
        taken = {name for node in definition.node for name in node.input} | {output.name for output in self.outputs}
        captures = [name for name in self.captures if name in taken or name.removesuffix(":0") in taken]
        return Subgraph(captures, self, definition, self.outputs, feeds)

    def structured(self, tensors: Iterable[tf.Tensor]) -> Any:
        """Return what the function returns, of values for its outputs."""
        computed, structure = iter(tensors), self.function.structured_outputs
        values = tf.nest.flatten(structure, expand_composites=True)
        # An output may be None or a number of Python, which is no tensor of the graph.
        values = [next(computed) if isinstance(value, tf.Tensor) else value for value in values]
        return tf.nest.pack_sequence_as(structure, values, expand_composites=True)

    def _is_pure_node(self, node: Any) -> bool:
        # Control flow and calls are as pure as the functions that they run; a node may also be named after one.
        called = [node.op] if node.op in self._functions else _called(node)
        if called:
            return all(map(self._is_pure_function, called))
        return node.op in READING or (node.op not in PYTHON and not is_stateful(node.op))

    def _is_pure_function(self, name: str) -> bool:
        if name not in self._pure_functions:
            self._pure_functions[name] = all(map(self._is_pure_node, self._functions[name].node_def))
        return self._pure_functions[name]


@dataclass(frozen=True, eq=False)
class Subgraph:
    """Part of a traced function, to be called in another.

    Attributes:
        captures: The names of the captures that it takes.
        whole: The graph that it is a part of.
        definition: The part as a protocol buffer.
        targets: The tensors that it computes.
        feeds: The tensors that it computes them from, beside the captures.
    """

    captures: list[str]
    whole: TracedGraph
    definition: Any
    targets: Sequence[tf.Tensor]
    feeds: Sequence[tf.Tensor]

    def function(self) -> Any:
        """Return a compiled function of values for the feeds.

        The subgraph is traced by itself, so it runs as a graph also while another thread runs functions eagerly.
        """
        specs = [tf.TensorSpec(feed.shape, feed.dtype) for feed in self.feeds]
        return tf.function(lambda *values: self(values), autograph=False).get_concrete_function(*specs)

    def __call__(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Add the subgraph to the graph that is being traced, with values for the feeds."""
        graph = tf.compat.v1.get_default_graph()
        known = {feed.name: value for feed, value in zip(self.feeds, values)}
        known |= {name: graph.capture(self.whole.captures[name]) for name in self.captures}
        wanted = [target.name for target in self.targets if target.name not in known]
        taken = {name for node in self.definition.node for name in node.input}
        # `import_graph_def` refuses a mapping that no node takes. Node inputs omit the port if it is 0.
        mapping = {name: value for name, value in known.items() if name.removesuffix(":0") in taken}
        results = tf.graph_util.import_graph_def(self.definition, mapping, wanted, name="part")
        known |= zip(wanted, results or ())
        return [known[target.name] for target in self.targets]

    def canonical_text(self, labels: Mapping[str, str]) -> str:
        """Return a text that is the same for the same computation.

        It leaves out the names of nodes and functions, since TensorFlow appends counters to some of them.

        Args:
            labels: What to write for the feeds and captures, by name.
        """
        functions = {inner.signature.name: inner for inner in self.definition.library.function}
        outside = {name.removesuffix(":0"): label for name, label in labels.items()}
        return repr(_canonical(self.definition.node, [target.name for target in self.targets], functions, outside))


def moves_more_than_variables(function: Any) -> str | None:
    """Return the type of an op of a traced function that may leave behind more than the values of variables, if any."""
    graph = function.graph.as_graph_def()
    types = {node.op for inner in graph.library.function for node in inner.node_def} | {node.op for node in graph.node}
    called = {inner.signature.name for inner in graph.library.function}
    return next((op for op in sorted(types - called) if not _ON_VARIABLES.fullmatch(op) and may_act(op)), None)


def peak_bytes(function: Any) -> int:
    """Return the most bytes that a traced function holds at a time, beside its arguments and variables: an estimate.

    Its ops run in the order in which they were traced, forward and then backward. A tensor is held from its op to the
    last one that takes it, an output to the end. One of a shape that is not known counts nothing.
    """
    ops = function.graph.get_operations()
    owner: dict[str, str] = {}  # whose memory a tensor is in: its own, or that of what it is a view of
    last_use: dict[str, int] = {}
    for number, op in enumerate(ops):
        taken = [owner[given.name] for given in op.inputs]
        for output in op.outputs:
            owner[output.name] = taken[0] if op.type in VIEWS else output.name
        last_use |= dict.fromkeys([*taken, *(owner[output.name] for output in op.outputs)], number)
    last_use |= {owner[output.name]: len(ops) for output in function.outputs}
    held, most = dict[str, int](), 0
    for number, op in enumerate(ops):
        ending = {owner[given.name] for given in op.inputs if last_use[owner[given.name]] == number}
        for output in op.outputs if op.type not in (*VIEWS, *READING, "Const", "Placeholder") else ():
            size = _bytes(output)
            # An elementwise op writes into the memory of what it takes, if nobody takes that later.
            replaced = next((name for name in ending if held.get(name) == size), None)
            if op.type in ELEMENTWISE and replaced is not None:
                held.pop(replaced)
            held[output.name] = size
        most = max(most, sum(held.values()))
        for name in ending | {output.name for output in op.outputs if last_use[owner[output.name]] == number}:
            held.pop(name, None)
    return most


def _bytes(tensor: tf.Tensor) -> int:
    is_known = tensor.shape.is_fully_defined() and tensor.dtype not in (tf.resource, tf.variant)
    return tensor.shape.num_elements() * tensor.dtype.size if is_known else 0


def _is_data(taken: str, nodes: Mapping[str, Any]) -> bool:
    """Tell whether a node waits for what it takes: a value, or a NoOp that joins what it waits for."""
    return taken[0] != "^" or (taken[1:] in nodes and nodes[taken[1:]].op == "NoOp")


def _sparse_shapes(function: Any, inputs: Iterable[tf.Tensor]) -> Iterator[str]:
    following = iter(inputs)
    for spec in tf.nest.flatten(function.structured_input_signature):
        if isinstance(spec, tf.TypeSpec):
            # A ragged or sparse argument takes several inputs; those of a sparse one are indices, values and shape.
            parts = [next(following) for _ in tf.nest.flatten(spec, expand_composites=True)]
            if isinstance(spec, tf.SparseTensorSpec):
                yield parts[2].name


def _called(node: Any) -> list[str]:
    """Return the names of the functions that a node calls."""
    found = [attr.func.name for attr in node.attr.values() if attr.HasField("func")]
    return found + [func.name for attr in node.attr.values() for func in attr.list.func]


def _canonical(
    nodes: Iterable[Any], returned: Iterable[str], functions: Mapping[str, Any], outside: Mapping[str, str]
) -> Any:
    """Return nodes and what they return as nested tuples, with numbers for names and bodies for functions."""
    nodes = list(nodes)
    numbers = {node.name: str(number) for number, node in enumerate(nodes)}

    def reference(name: str) -> tuple[str, str]:
        node, _, port = name.partition(":")
        return numbers.get(node, outside.get(node, node)), port

    def body(name: str) -> Any:
        inner = functions[name]
        arguments = {argument.name: f"argument {n}" for n, argument in enumerate(inner.signature.input_arg)}
        return _canonical(inner.node_def, [value for _, value in sorted(inner.ret.items())], functions, arguments)

    def attribute(attr: Any) -> Any:
        if attr.HasField("func"):
            return body(attr.func.name)
        return [body(func.name) for func in attr.list.func] or attr.SerializeToString(deterministic=True)

    computed = [
        (
            body(node.op) if node.op in functions else node.op,
            [reference(name) for name in node.input if name[0] != "^"],
            [(key, attribute(attr)) for key, attr in sorted(node.attr.items()) if key[0] != "_"],
        )
        for node in nodes
    ]
    return computed, [reference(name) for name in returned]
