"""Which convolutions of an ONNX model are worth int8: those that save more time than int8's borders cost.

Sizes alone decide. The times are nanoseconds of one thread with AVX-512 VNNI, as measured (docs/exports.md); only their
ratios count.
"""

from collections.abc import Collection, Iterator
from math import prod
from typing import Any

BETWEEN = ("Relu", "MaxPool", "Add")  # what stays in int8 between convolutions
SAVED = 0.012  # by a multiply-add as int8, less than that ...
GATHERED = 2.0  # ... for each place of the kernel at each pixel of the output
BORDER, ENTERED, LEFT = 1000.0, 0.15, 0.3  # for a tensor that becomes int8 or float32 again, and for each element


class Regions:
    """The parts of a model that are int8 if given convolutions are.

    Args:
        model: onnx.ModelProto, whose nodes stand in an order in which they can run.
    """

    def __init__(self, model: Any) -> None:
        graph = model.graph
        self.nodes = {node.name: node for node in graph.node}
        self.made = {output: node.name for node in graph.node for output in node.output}
        self.users: dict[str, list[str]] = {}
        for name, given in [(node.name, given) for node in graph.node for given in node.input]:
            self.users.setdefault(given, []).append(name)
        for value in graph.output:
            self.users.setdefault(value.name, []).append("")
        self.sizes = {value.name: _size(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        self.weights = {each.name: each.dims for each in graph.initializer}

    def worth(self, candidates: Collection[str]) -> set[str]:
        """Return those of some convolutions that together take less time as int8 than as float32."""
        kept, before = set(candidates), set[str]()
        while kept != before:
            before = kept
            kept = set().union(*(self._best(region) for region in self._apart(before)))
        return kept

    def between(self, chosen: Collection[str]) -> set[str]:
        """Return the nodes all of whose inputs come from chosen convolutions, perhaps through other such nodes."""
        inside, found = set(chosen), set[str]()
        for name, node in self.nodes.items():
            if node.op_type in BETWEEN and all(self.made.get(given) in inside for given in node.input):
                inside.add(name)
                found.add(name)
        return found

    def gain(self, chosen: Collection[str]) -> float:
        """Return how many nanoseconds a batch of one takes less if these convolutions are int8."""
        inside = {*chosen, *self.between(chosen)}
        entered = {given for name in inside for given in self._given(name) if self.made.get(given) not in inside}
        made = {output for name in inside for output in self.nodes[name].output}
        left = {output for output in made if any(name not in inside for name in self.users.get(output, []))}
        border = sum(BORDER + ENTERED * self.sizes.get(name, 0) for name in entered)
        border += sum(BORDER + LEFT * self.sizes.get(name, 0) for name in left)
        return sum(self._saved(name) for name in chosen) - border

    def _saved(self, name: str) -> float:
        """Return how many nanoseconds a convolution takes less as int8, between others that are int8."""
        node = self.nodes[name]
        outputs, inputs, *kernel = self.weights[node.input[1]]
        places = self.sizes.get(node.output[0], 0) // outputs * prod(kernel)
        return places * (SAVED * inputs * outputs - GATHERED)

    def _best(self, region: set[str]) -> set[str]:
        """Return what is left of a region without the convolutions that cost more than they save."""
        for name in sorted(region) if len(region) > 1 else ():
            if self.gain(region - {name}) >= self.gain(region):
                region = region - {name}
        return region if self.gain(region) > 0 else set()

    def _apart(self, chosen: set[str]) -> Iterator[set[str]]:
        """Yield the convolutions of each region; a tensor connects those that make it or take it."""
        inside = {*chosen, *self.between(chosen)}
        while inside:
            waiting = [min(inside)]
            region = set(waiting)
            inside -= region
            while waiting:
                node = self.nodes[waiting.pop()]
                tensors = (*self._given(node.name), *node.output)
                near = {
                    name for tensor in tensors for name in (self.made.get(tensor), *self.users.get(tensor, [])) if name
                }
                waiting += near & inside
                region |= near & inside
                inside -= near
            yield region & chosen

    def _given(self, name: str) -> list[str]:
        """Return a node's inputs that are not constants."""
        return [given for given in self.nodes[name].input if given and given not in self.weights]


def _size(value: Any) -> int:
    """Return how many elements a tensor has in a batch of one."""
    return prod(axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim)
