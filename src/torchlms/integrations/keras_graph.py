"""ForgetfulGraph: runs a Keras functional model as Keras does, but lets go of what is used up.

Keras keeps the output of every layer in a dictionary until the forward pass is over. What somebody
holds cannot leave the device, so that this alone would keep all activations there. Same layers, same
order, same bits; each output is forgotten after the last layer that reads it.

[Note: Names of Keras] ``_run_through_graph`` and ``_nodes_by_depth`` are not promised by Keras. Where
a model lacks them nothing is replaced: training is right all the same, only more stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

_RUN = "_run_through_graph"


def forget_early(model: Any, undo: ExitStack) -> None:
    """Have ``model`` and the models within it forget what is used up, until ``undo`` is closed."""
    for graph in _graphs(model):
        vars(graph)[_RUN] = ForgetfulGraph(graph)  # past Keras's own __setattr__, which would track it
        undo.callback(vars(graph).pop, _RUN, None)


class ForgetfulGraph:
    """Stands in for the ``_run_through_graph`` of one functional model."""

    def __init__(self, graph: Any) -> None:
        self._keras = getattr(graph, _RUN)
        self._inputs = [id(tensor) for tensor in graph.inputs]
        self._outputs = [id(tensor) for tensor in graph.outputs]
        depths = sorted(graph._nodes_by_depth, reverse=True)
        self._nodes = [node for depth in depths for node in graph._nodes_by_depth[depth] if node.operation]
        self._used_up = self._last_uses()

    def __call__(
        self, inputs: Any, operation_fn: Callable[[Any], Any] = lambda op: op, call_fn: Any = None
    ) -> Any:
        from keras import tree

        if call_fn is not None:  # nothing is computed, only shapes
            return self._keras(inputs, operation_fn, call_fn)
        known = dict(zip(self._inputs, tree.flatten(inputs), strict=False))
        for node, used_up in zip(self._nodes, self._used_up, strict=True):
            if not node.is_input and all(id(tensor) in known for tensor in node.input_tensors):
                results = _run(node, operation_fn, known)
                known.update(zip(map(id, node.outputs), tree.flatten(results), strict=False))
                del results
            for tensor in used_up:
                known.pop(tensor, None)
        if any(tensor not in known for tensor in self._outputs):
            return self._keras(inputs, operation_fn)  # whose error says which output is not connected
        structure = self._keras.__self__._outputs_struct
        return tree.pack_sequence_as(structure, [known[tensor] for tensor in self._outputs])

    def _last_uses(self) -> list[list[int]]:
        """For each node the tensors that no later one reads, those of its own that nobody reads included."""
        seen = set(self._outputs)
        found = []
        for node in reversed(self._nodes):
            mine = {id(tensor) for tensor in (*node.input_tensors, *node.outputs)} - seen
            seen |= mine
            found.append(sorted(mine))
        return found[::-1]


def _run(node: Any, operation_fn: Callable[[Any], Any], known: dict[int, Any]) -> Any:
    """In a function of its own, so that nothing holds its arguments afterwards."""
    args, kwargs = node.arguments.fill_in(known)
    return operation_fn(node.operation)(*args, **kwargs)


def _graphs(model: Any) -> Iterator[Any]:
    """The functional models within ``model``, once each; a Sequential keeps one aside."""
    seen = set()
    for layer in model._flatten_layers() if hasattr(model, "_flatten_layers") else ():
        for graph in (layer, getattr(layer, "_functional", None)):
            if hasattr(graph, _RUN) and hasattr(graph, "_nodes_by_depth") and id(graph) not in seen:
                seen.add(id(graph))
                yield graph
