"""Find the residual add in the forward of a block, and which of its sides is the branch.

The graph holds the operations of the block's own `forward`, with every child as one call
(`cbam.surgery.tracing`). The trunk is followed back from the output, at each residual add along the shortcut.
`cbam.surgery.trial` then checks the result by running the block.
"""

import inspect
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd

from cbam.surgery.tracing import scalars

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CATS = {torch.cat, torch.concat}
_MATMULS = {"matmul", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention"}
_DROPS = re.compile(r"Identity|Drop(out|path|block)|StochasticDepth", re.IGNORECASE)
_ACTIVATION = re.compile(
    r"(leaky_|hard_?|log_?|[cprs])?(relu6?|[cs]?elu|gelu|glu|silu|swish|mish|sigmoid|tanh|softplus|softmax)_?"
)
_ACTIVATION_CLASS = re.compile(
    r"relu|elu|silu|swish|mish|glu|sigmoid|tanh|softplus|softmax|snake|evonorm|tlu", re.I
)
MAX_SHORTCUT_CONVS = 2


@dataclass(frozen=True)
class Add:
    """An add on a block's trunk, and why attention does not belong before it.

    Attributes:
        reason: empty if it does.
        ends_trunk: whether neither side is a shortcut that could be followed further back.
        on_request: whether attention may go there if the user names the block.
    """

    node: Node
    branch: Node
    shortcut: Node
    reason: str = ""
    ends_trunk: bool = False
    on_request: bool = False


class Trunk:
    """The adds along the trunk of one block's graph.

    Attributes:
        graph, effects: of the block, from `trace_with_effects`.
        adds: the last one first.
        note: why the trunk ends in a sum of another kind; empty if it does not.
    """

    def __init__(self, block: nn.Module, graph: fx.Graph, effects: list[str]) -> None:
        self.graph, self.effects = graph, effects
        self._children = dict(block.named_modules())
        self._names = {n: id(m) for n, m in block.named_modules(remove_duplicate=False)}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._scalars = scalars(graph)
        self._ancestors = self._all_ancestors(graph)
        self.adds: list[Add] = []
        self.note = ""
        self._walk(_first_node(next(iter(reversed(graph.nodes))).args[0]))

    def inputs(self, node: Node) -> list[Node]:
        """The tensors that `node` reads, except parameters and sizes."""
        return [n for n in node.all_input_nodes if n.op != "get_attr" and n not in self._scalars]

    def _walk(self, node: Node | None) -> None:
        while node is not None and node.op != "placeholder":
            inputs = self.inputs(node)
            if _is_add(node) and len(inputs) == 2:
                add = self._classify(node, *inputs)
                self.adds.append(add)
                node = None if add.ends_trunk else add.shortcut
            elif len(inputs) == 1:
                node = inputs[0]
            else:
                self.note = self._partial(node)
                return

    def _classify(self, node: Node, a: Node, b: Node) -> Add:
        if a in self._ancestors[b] or b in self._ancestors[a]:
            shortcut, branch = (a, b) if a in self._ancestors[b] else (b, a)
            fork = shortcut
        else:
            common = self._ancestors[a] & self._ancestors[b]
            if not common:
                return Add(node, b, a, "parallel sum: its two sides share no input", ends_trunk=True)
            fork = max(common, key=self._order.__getitem__)
            depths = {n: self._convs(self._between(fork, n)) for n in (a, b)}
            shortcut, branch = sorted((a, b), key=depths.__getitem__)
            if depths[shortcut] == depths[branch] or depths[shortcut] > MAX_SHORTCUT_CONVS:
                reason = "parallel sum: neither side is a shortcut"
                return Add(node, branch, shortcut, reason, ends_trunk=True)
        inner = self._between(fork, branch)
        if any(_name(n) in _MATMULS for n in inner):
            return Add(node, branch, shortcut, "an attention module: its branch multiplies matrices")
        if not self._convs(inner) or not any(self._is_nonlinear(n) for n in inner):
            reason = "linear branch: it lacks a convolution or a nonlinearity"
            return Add(node, branch, shortcut, reason, on_request=True)
        return Add(node, branch, shortcut)

    def _partial(self, node: Node) -> str:
        """Why the walk ends at a node with several inputs."""
        sums = [p for p in self.inputs(node) if _is_add(p) and len(self.inputs(p)) == 2]
        if node.target not in _CATS or not sums:
            return ""
        if any(_is_slice(n) for p in sums for n in self.inputs(p)):
            return "partial residual: the add covers a slice of the channels"
        return "a cell: its output concatenates parallel sums"

    def _between(self, fork: Node, end: Node) -> set[Node]:
        return self._ancestors[end] - self._ancestors[fork]

    def _convs(self, nodes: set[Node]) -> int:
        count = sum(_name(n).startswith(("conv1d", "conv2d", "conv3d", "deform_conv")) for n in nodes)
        return count + sum(
            convolutions(self._children[str(n.target)]) for n in nodes if n.op == "call_module"
        )

    def _is_nonlinear(self, node: Node) -> bool:
        if node.op == "call_module":
            return any(_is_nonlinear(m) for m in self._children[str(node.target)].modules())
        return _ACTIVATION.fullmatch(_name(node)) is not None

    def _all_ancestors(self, graph: fx.Graph) -> dict[Node, set[Node]]:
        """For each node, itself and all nodes that it is computed from."""
        ancestors: dict[Node, set[Node]] = {}
        for node in graph.nodes:
            ancestors[node] = {node}.union(*(ancestors[n] for n in self.inputs(node)))
        return ancestors

    def steps_back(self, branch: Node) -> Iterator[tuple[str, str]]:
        """Places at the end of the branch, as (child, "after" | "before"), best first.

        Dropout, drop path, identities and scalar factors are skipped, back to the last child that computes.
        """
        passed: list[str] = []
        node = branch
        while len(self.inputs(node)) == 1:
            if node.op == "call_module":
                if not _DROPS.search(type(self._children[str(node.target)]).__name__):
                    yield str(node.target), "after"
                    break
                passed.append(str(node.target))
            elif not (node.target in _MULTIPLIES and self._by_scalar(node)) and "drop" not in _name(node):
                break
            node = self.inputs(node)[0]
        for child in reversed(passed):
            yield child, "before"

    def tail(self, add: Add) -> Node | None:
        """The ReLU of a block that ends in relu(norm + shortcut), if nothing else reads the norm or the add.

        Norm and add are deferred until the ReLU, so nothing may write to their inputs before it: the norm's
        input has no other reader and shares no memory, and the ReLU directly follows the add.
        """
        after = list(add.node.users)
        relu = after[0] if len(after) == 1 else None
        found = (
            relu is not None
            and self._is_a(relu, nn.ReLU, "relu")
            and [user.op for user in relu.users] == ["output"]
            and self._is_a(add.branch, nn.BatchNorm2d, None)
            and len(add.branch.users) == 1
            and all(self._is_new(n) for n in self.inputs(add.branch))
            and [*self._names.values()].count(self._names[str(add.branch.target)]) == 1
            and self._order[relu] == self._order[add.node] + 1
            and not (add.node.target in _ADDS_IN_PLACE and add.node.args[0] is add.shortcut)
            and not any("kept" in node.meta for node in (add.branch, add.node))
        )
        return relu if found else None

    def _is_new(self, node: Node) -> bool:
        """Whether a value shares its memory with nothing else: all values that may alias it are read once."""
        if len(node.users) != 1 or node.op not in ("call_module", "call_function", "call_method"):
            return False
        return self._convs({node}) > 0 or all(self._is_new(n) for n in self.inputs(node))

    def shortcut(self, add: Add) -> str:
        """The direct child, a Sequential, that computes the shortcut; empty if it has another reader."""
        node = add.shortcut
        found = (
            self._is_a(node, nn.Sequential, None)
            and "." not in str(node.target)
            and [n for n in self._order if n.op == "call_module" and n.target == node.target] == [node]
            and len(node.users) == 1
            and "kept" not in node.meta
        )
        return str(node.target) if found else ""

    def _is_a(self, node: Node, kind: type[nn.Module], name: str | None) -> bool:
        if node.op == "call_module":
            return type(self._children[str(node.target)]) is kind
        return name is not None and _name(node).rstrip("_") == name

    def _by_scalar(self, node: Node) -> bool:
        """Whether the other factor of a product is a number or a parameter with one element."""
        factors = [a for a in node.args if a not in self.inputs(node)]
        if len(factors) != 1:
            return False
        factor = factors[0]
        if isinstance(factor, Node) and "constant" in factor.meta:
            return factor.meta["constant"].numel() == 1
        if isinstance(factor, Node) and factor.op == "get_attr":
            *owner, leaf = str(factor.target).split(".")
            return getattr(self._children[".".join(owner)], leaf).numel() == 1
        return not isinstance(factor, Node)


def _is_add(node: Node) -> bool:
    return node.op != "call_module" and node.target in _ADDS


def convolutions(module: nn.Module) -> int:
    """Count the convolutions in `module`, itself included."""
    return sum(_is_convolution(m) for m in module.modules())


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return True
    leaf = next(module.children(), None) is None
    return leaf and "Conv" in type(module).__name__ and next(module.parameters(), None) is not None


def _is_nonlinear(module: nn.Module) -> bool:
    if type(module).__module__ == "torch.nn.modules.activation":
        return True
    if next(module.children(), None) is None and _ACTIVATION_CLASS.search(type(module).__name__):
        return True
    own = vars(type(module)).get("_cbam_base", type(module))  # the class without attention
    code = getattr(inspect.unwrap(own.forward), "__code__", None)
    library = own.__module__.startswith("torch.nn.")
    return code is not None and not library and any(_ACTIVATION.fullmatch(name) for name in code.co_names)


def _is_slice(node: Node) -> bool:
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, tuple) and any(isinstance(i, slice) for i in index)


def _name(node: Node) -> str:
    """The name of the function or tensor method that a node calls; "" for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _first_node(value) -> Node | None:
    """The tensor, or the first of several, that a forward returns."""
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    return next((v for v in value if isinstance(v, Node)), None) if isinstance(value, list | tuple) else None
