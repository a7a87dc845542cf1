"""Trace the forward of one block, with each child as one call, and report what a graph cannot express."""

import contextlib
import dis
import inspect
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.proxy import Attribute, TraceError
from torch.utils._pytree import tree_leaves

from cbam.surgery import bytecode
from cbam.surgery.effects import rng_restored, state_restored

BRANCHES = "branches on its input"
_SHAPE_READERS = {"size", "dim", "numel"}
_KINDS = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}


class _Sized(fx.Proxy):
    tracer: "_ShallowTracer"

    def __len__(self) -> int:
        return len(self.tracer.known(self))


class _Attribute(_Sized, Attribute):
    """An attribute of a value in a trace, such as its shape."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)


class _Value(_Sized):
    """A value in a trace; in-place operations are recorded as such, which fx does not do."""

    def __getattr__(self, k: str) -> _Attribute:
        return _Attribute(self, k)


def _in_place(function: Callable) -> Callable:
    def recorded(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return recorded


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Value, f"__{_function.__name__}__", _in_place(_function))


class _ShallowTracer(fx.Tracer):
    """Traces the forward of one module; children remain calls, except those that only add.

    With an `example`, decisions on the shape, dtype or device of a value are those for the example, and
    *args and **kwargs are empty.
    """

    def __init__(self, example: Tensor | None) -> None:
        super().__init__()
        self.modes: set[tuple[bool, bool, bool]] = set()
        self.effects: list[str] = []
        self._example = example
        self._evaluates = False

    def proxy(self, node: Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args, **kwargs) -> Node:
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        self.modes.add((torch.is_grad_enabled(), *autocast))
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        function, given = super().create_args_for_root(root_fn, is_module, concrete_args)
        names = [str(a.node.target) if isinstance(a, fx.Proxy) else "" for a in given]
        if self._example is not None:
            given = [
                {} if name.startswith("**") else () if name.startswith("*") else value
                for name, value in zip(names, given, strict=True)
            ]
        return function, given

    def call_module(self, m, forward, args, kwargs):
        values = [v for v in tree_leaves((args, kwargs)) if isinstance(v, fx.Proxy)]
        adds = len(values) > 1 and _only_adds(m)
        if adds:
            self.effects.append(f"adds in self.{self.path_of_module(m)}")
        return (
            forward(*args, **kwargs)
            if adds or self._evaluates
            else super().call_module(m, forward, args, kwargs)
        )

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self._evaluates else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.known(obj))

    def known(self, value: fx.Proxy) -> Any:
        """The value for the example of `value`, which may depend only on sizes, dtypes and devices."""
        node = value.node  # the node of an attribute is created on this access
        if self._example is None or node not in scalars(self.graph):
            raise TraceError(f"it {BRANCHES}")
        self.effects.append(BRANCHES)
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        self._evaluates = True
        try:
            with torch.no_grad():
                interpreter.run(self._example.clone())
        finally:
            self._evaluates = False
        return interpreter.env[node]


def trace(block: nn.Module) -> fx.Graph:
    """The graph of `block.forward` with default arguments, in eval mode.

    What the forward changes in `block` and in random generators is restored. Raises what the forward raises
    on symbolic values.
    """
    return trace_with_effects(block, training=False)[0]


def trace_with_effects(
    block: nn.Module, *, training: bool, example: Tensor | None = None
) -> tuple[fx.Graph, list[str]]:
    """`trace`, and a list of what the forward does that a graph cannot express.

    Args:
        example: an input for `block`. A forward that depends on sizes is traced as it runs for this input.
    """
    parameters = inspect.signature(type(block).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with contextlib.ExitStack() as stack:
        changes = [stack.enter_context(state_restored(m, name)) for name, m in block.named_modules()]
        draws = stack.enter_context(rng_restored())
        block.training = training
        own = {*vars(block)}
        tracer = _ShallowTracer(example)
        graph = tracer.trace(block, concrete_args=defaults)
        foreign = _move_constants(block, graph, own)
        for value in tree_leaves([{**vars(m)} for m in block.modules()]):
            if isinstance(value, fx.Proxy):
                value.node.meta["kept"] = True  # stored in the block, which may read it later
    switches = ["switches gradients or autocast"] if len(tracer.modes) > 1 else []
    return graph, [*itertools.chain(*changes), *draws, *switches, *foreign, *tracer.effects]


def _move_constants(block: nn.Module, graph: fx.Graph, own: set[str]) -> list[str]:
    """Move constants of the forward, which fx stores on `block`, to their nodes; report if there are any."""
    nodes = [n for n in graph.nodes if n.op == "get_attr" and str(n.target) in {*vars(block)} - own]
    for node in nodes:
        node.meta["constant"] = getattr(block, str(node.target))
    for name in {str(node.target) for node in nodes}:
        delattr(block, name)
    return ["uses a tensor that the block does not hold"] if nodes else []


def adds_values(block: nn.Module) -> bool:
    """Whether the code of `block.forward` contains an addition; for blocks that cannot be traced."""
    code = getattr(inspect.unwrap(type(block).forward), "__code__", None)
    return code is not None and any(
        i.argrepr in ("+", "+=") or (i.argval in ("add", "add_") and i.opcode in dis.hasname)
        for part in bytecode.nested(code)
        for i in dis.get_instructions(part)
    )


def _only_adds(module: nn.Module) -> bool:
    """Whether `module` does nothing but add."""
    held = itertools.chain(module.children(), module.parameters(), module.buffers())
    if next(held, None) is not None or not adds_values(module):
        return False
    code = inspect.unwrap(type(module).forward).__code__
    stores = {i.opname for i in dis.get_instructions(code) if i.opname.startswith("STORE_")}
    return {"torch", "operator", "add"}.issuperset(code.co_names) and stores <= {"STORE_FAST"}


def scalars(graph: fx.Graph) -> set[Node]:
    """Nodes that are sizes, dtypes or devices, or computed only from these."""
    found: set[Node] = set()
    for node in graph.nodes:
        reads_shape = (node.target is getattr and len(node.args) > 1 and node.args[1] in _KINDS) or (
            node.op == "call_method" and node.target in _SHAPE_READERS
        )
        from_sizes = (
            node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        )
        if reads_shape or from_sizes:
            found.add(node)
    return found
