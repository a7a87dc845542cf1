"""Put attention on a block's branch without touching a child, a key or a hook.

The block's class is swapped for a subclass of the same name whose forward is the block's own code with one
call redirected: `self.bn3(x)` runs as `self._cbam_call(x)`, which is `self.cbam(self.bn3(x))`. It renames one
entry of the code object, so it needs no source text and follows the branches, closures and helper methods of
the original. Children stay what they are: conversion to SyncBatchNorm, hooks and state dicts do not notice.
Where no child can be redirected, the forward is generated from the block's traced graph.
"""

import abc
import contextlib
import dis
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cbam.nn.tail import Pending, begin, watched
from cbam.surgery.graph import trace_with_effects

SLOT = "cbam"  # the attribute that holds the attention, as in the authors' released checkpoints
_REDIRECTED = "_cbam_call"
_OWN = frozenset(vars(nn.Module()))  # `training` and the dicts of children
_ENTERS = ("BEFORE_WITH", "LOAD_SPECIAL")  # a `with`, until Python 3.13 and from 3.14
_NEW_OBJECT = object().__reduce_ex__(2)[0]  # what rebuilds an object that does not pickle itself


@dataclass(frozen=True)
class Route:
    """Where in a block the attention runs.

    Attributes:
        when: "after" or "before" the call of `child`; on the block's "output"; or at a value of the block's
            "graph".
        child: the direct child whose call is redirected, or the name of the value in the graph.
        source: for "graph", the generated forward and the importable names it uses.
        tail: whether `child` is the norm of the block's end, `relu(attention(norm(x)) + shortcut)`, which may
            run as one operation.
        relu: for a tail, the direct child that is its ReLU; empty where the code calls a function.
        alias: the property by which the code calls `child`; empty where it calls it by its name.
    """

    when: str
    child: str = ""
    source: str = ""
    names: tuple[tuple[str, str, str], ...] = ()
    tail: bool = False
    relu: str = ""
    alias: str = ""

    def __str__(self) -> str:
        return (
            "on its output"
            if self.when == "output"
            else f"{self.when} {self.child}".replace("graph", "after")
        )


class UnroutableError(Exception):
    """The code of a block does not allow a route; the text says why."""


def refine(block: nn.Module, route: Route, attention: nn.Module) -> None:
    """Make `attention` part of `block`; `restore` is the exact inverse."""
    refined = refined_class(plain_class(block), route)  # first: where it fails, the block is as it was
    block.add_module(SLOT, attention)
    block.__class__ = refined


def restore(block: nn.Module) -> nn.Module:
    """Take the attention out of `block` and return it."""
    attention = block._modules.pop(SLOT)
    block.__class__ = vars(type(block))["_cbam_base"]
    assert isinstance(attention, nn.Module)
    return attention


@contextlib.contextmanager
def paused(block: nn.Module) -> Iterator[None]:
    """For a `with`: `block` runs the code of its base; the attention stays its child."""
    refined = type(block)
    block.__class__ = _without(vars(refined)["_cbam_base"], vars(refined)["_cbam_route"])
    try:
        yield
    finally:
        block.__class__ = refined


@functools.cache
def _without(base: type[nn.Module], route: Route) -> type[nn.Module]:
    """`base`, or where its forward may run all of its children in turn, one that leaves the attention out."""
    if route.when == "graph":
        return _subclass(base, {"forward": _generated_forward(route), SLOT: staticmethod(lambda x: x)})
    if base.forward is nn.Sequential.forward:
        return _subclass(base, {"forward": _skipping})
    return base


def _skipping(self, x):
    for name, child in self._modules.items():
        x = x if name == SLOT else child(x)
    return x


def is_refined(block: nn.Module) -> bool:
    """Whether `refine` was applied to `block`; a slice of a refined sequence is one without attention."""
    return hasattr(type(block), "_cbam_route") and SLOT in block._modules


def is_last_refined(block: nn.Module) -> bool:
    """Whether nobody changed the class of a refined `block` after that, so that `restore` can undo it."""
    return "_cbam_route" in vars(type(block))


def plain_class(block: nn.Module) -> type[nn.Module]:
    """The class of `block` as it would be without attention."""
    return vars(type(block)).get("_cbam_base", type(block))


@functools.cache
def refined_class(base: type[nn.Module], route: Route) -> type[nn.Module]:
    """The subclass of `base` that runs `self.cbam` at `route`.

    Raises:
        UnroutableError: the code of `base` does not allow the route.
    """
    behind: dict[type[nn.Module], dict[str, Any]] = {}
    if route.when == "graph":
        methods: dict[str, Any] = {"forward": _generated_forward(route)}
    elif route.when == "output":
        methods = {"forward": _output_forward(base)}
    else:
        behind = _redirected_methods(base, route.alias or route.child)
        methods = behind.pop(base, {})
        methods[_REDIRECTED] = _redirected_call(route)
        if route.tail:
            methods["forward"] = _settled(methods.get("forward", base.forward))
    return _subclass(
        base,
        methods | {"_cbam_base": base, "_cbam_route": route, "__reduce_ex__": _reduce_ex},
        # `super()` of a method of `base` meets each of these right before the class that it is made of
        *(_subclass(c, behind[c]) for c in base.__mro__ if c in behind),
    )


class _Silent(nn.Module):
    """Keeps `__init_subclass__` of the bases after it from running: registries are to know `base` alone."""

    def __init_subclass__(cls) -> None:
        pass


def _subclass(base: type, namespace: dict[str, Any], *others: type) -> type:
    """A subclass of `base` and `others` by the name of `base`, of whose making nobody hears."""
    kind = type(base)  # a metaclass may keep a registry, too
    make = abc.ABCMeta if issubclass(kind, abc.ABCMeta) else type
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    made = make.__new__(kind, base.__name__, (_Silent, base, *others), namespace | named)
    made.__bases__ = (base, *others)
    return made


def child_route(block: nn.Module, when: str, child: str) -> Route:
    """The route before or after the call of a direct child, by whatever name the code calls it."""
    names = {n for f in _reached(type(block)).values() for c in _codes(f.__code__) for n in c.co_names}
    if child not in names:
        for name in sorted(names):
            with contextlib.suppress(Exception):  # a property raises what it likes
                known = isinstance(inspect.getattr_static(block, name), property)
                if known and getattr(block, name) is block._modules[child]:
                    return Route(when, child, alias=name)
    return Route(when, child)


def graph_route(block: nn.Module, value: str) -> Route:
    """A route by a forward generated from the graph of `block`, with attention on the value named `value`.

    Raises:
        UnroutableError: the forward does what no graph holds, the train and eval graphs differ (dropout would
            be baked), or the graph uses an object that a pickle cannot name.
    """
    _refuse_lost(block)
    code = [_with_attention(block, value, training) for training in (False, True)]
    if code[0].src != code[1].src:
        raise UnroutableError("its forward differs between training and evaluation")
    used = sorted(name for name in code[0].globals if re.search(rf"\b{name}\b", code[0].src))
    names = tuple(_importable(name, code[0].globals[name]) for name in used)
    return Route("graph", value, code[0].src, names)


def _refuse_lost(block: nn.Module) -> None:
    """Refuse a forward that a trace would strip of a `with`, an argument, or reading a setting each time."""
    for parameter in inspect.signature(type(block).forward).parameters.values():
        if parameter.default is not parameter.empty:
            raise UnroutableError(
                f"its forward has a default for {parameter.name}, which a generated one would freeze"
            )
    for code in (c for function in _reached(type(block)).values() for c in _codes(function.__code__)):
        if any(i.opname in _ENTERS for i in dis.get_instructions(code)):
            raise UnroutableError("its forward enters a `with`, which a generated one would leave out")
        texts = {c for c in code.co_consts if isinstance(c, str)} if "getattr" in code.co_names else set()
        for name in sorted({*code.co_names, *texts} - _OWN):
            if _is_setting(inspect.getattr_static(block, name, None)):
                raise UnroutableError(f"its forward reads self.{name}, which a generated one would freeze")


def _is_setting(value: Any) -> bool:
    """Whether a trace takes down what `value` says, and not that it is read."""
    code = isinstance(value, property | staticmethod | classmethod) or callable(value)
    return not (value is None or code or isinstance(value, Tensor | nn.Module))


def _with_attention(block: nn.Module, value: str, training: bool):
    graph, effects = trace_with_effects(block, training=training)
    if effects:
        raise UnroutableError(f"its forward {effects[0]}, which a generated one would leave out")
    node = next((n for n in graph.nodes if n.name == value), None)
    if node is None:
        raise UnroutableError("its forward differs between training and evaluation")
    with graph.inserting_after(node):
        attended = graph.call_module(SLOT, (node,))
    node.replace_all_uses_with(attended, delete_user_cb=lambda user: user is not attended)
    return graph.python_code("self")


def _importable(name: str, target: Any) -> tuple[str, str, str]:
    if isinstance(target, types.ModuleType):
        return name, target.__name__, ""
    module, qualname = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if name in ("inf", "nan"):
        return name, "math", name
    if module and _resolve(module, qualname) is target:
        return name, module, qualname
    raise UnroutableError(f"its graph uses {target!r}, which cannot be imported by name")


def _resolve(module: str, qualname: str) -> Any:
    try:
        found = importlib.import_module(module)
        return functools.reduce(getattr, qualname.split("."), found) if qualname else found
    except (ImportError, AttributeError):
        return None


def _generated_forward(route: Route) -> Callable:
    namespace = {name: _resolve(module, qualname) for name, module, qualname in route.names}
    exec(compile(route.source, f"<cbam: forward with attention after {route.child}>", "exec"), namespace)
    return namespace["forward"]


def _output_forward(base: type[nn.Module]) -> Callable:
    if base.forward is nn.Sequential.forward:
        return base.forward  # it runs its children in order, and the attention is the last of them

    def forward(self, *args, **kwargs):
        return self.cbam(base.forward(self, *args, **kwargs))

    return forward


def _redirected_call(route: Route) -> Callable:
    child = route.child
    if route.tail:

        def begin_tail(self, x):
            relu = self._modules.get(route.relu)
            if route.relu and (type(relu) is not nn.ReLU or watched(relu)):
                return self.cbam(getattr(self, child)(x))
            return begin(getattr(self, child), self.cbam, x, self)

        return begin_tail
    if route.when == "after":

        def call(self, *args, **kwargs):
            return self.cbam(getattr(self, child)(*args, **kwargs))

        return call

    def call_on_attended(self, x, *args, **kwargs):
        return getattr(self, child)(self.cbam(x), *args, **kwargs)

    return call_on_attended


def is_straight(base: type[nn.Module], child: str) -> bool:
    """Whether `forward` itself calls `child`, and enters no context.

    What waits for the end of a block must meet it where it was made: inside a `with`, or a function that is
    handed to `checkpoint`, it would be computed by other rules.
    """
    code = getattr(base.forward, "__code__", None)
    if code is None or child not in code.co_names:
        return False
    return not any(i.opname in _ENTERS for i in dis.get_instructions(code))


def _settled(forward: Callable) -> Callable:
    """`forward` returning a tensor also where no ReLU came to what was waiting for it."""

    def settled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return out.tensor() if isinstance(out, Pending) else out

    code = settled.__code__.replace(co_filename=f"<cbam: {forward.__name__} with a tail of one operation>")
    settled.__code__ = code  # scripting must find no source
    return settled


def _redirected_methods(base: type[nn.Module], child: str) -> dict[type[nn.Module], dict[str, Any]]:
    """Copies of the methods that `forward` reaches and that call `child`, with that call redirected.

    By class: those of `base`, and those that are found through `super()` in a class behind it.
    """
    methods: dict[type[nn.Module], dict[str, Any]] = {}
    for (place, name), function in _reached(base).items():
        if isinstance(inspect.getattr_static(place, name), property):
            continue
        if any(child in code.co_names for code in _codes(function.__code__)):
            _check_code(function, child)
            methods.setdefault(place, {})[name] = _renamed(function, child)
    if not methods:
        raise UnroutableError(f"no method of {base.__name__} names {child}")
    return methods


def _reached(base: type[nn.Module]) -> dict[tuple[type, str], types.FunctionType]:
    """The methods and properties that `forward` uses, itself included: of `base` and behind `super()`."""
    reached: dict[tuple[type, str], types.FunctionType] = {}
    pending: list[tuple[type | None, int, str]] = [(base, 0, "forward")]
    while pending:
        place, start, name = pending.pop()
        owner = next((c for c in base.__mro__[start:] if name in vars(c)), object)
        function = vars(owner).get(name)  # as it is written: static and class methods are none
        function = function.fget if isinstance(function, property) else function
        key = place or owner, name
        if key in reached or owner is nn.Module or not isinstance(function, types.FunctionType):
            continue
        reached[key] = function
        names = {n for code in _codes(function.__code__) for n in code.co_names}
        pending += [(base, 0, n) for n in names]
        if "super" in names:
            pending += [(None, base.__mro__.index(owner) + 1, n) for n in names]
    return reached


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _check_code(function: types.FunctionType, child: str) -> None:
    """Every use of the name must be an attribute read from `self`: renaming reaches all uses alike."""
    receiver = function.__code__.co_varnames[0]
    for code in _codes(function.__code__):
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.argval == child and instruction.opcode in dis.hasname:
                read = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
                if not (read and before is not None and _loads(before, receiver)):
                    raise UnroutableError(
                        f"{function.__qualname__} uses the name {child} for something else too"
                    )
            before = instruction


def _loads(instruction: dis.Instruction, variable: str) -> bool:
    last = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
    return instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == variable


def _renamed(function: types.FunctionType, child: str) -> types.FunctionType:
    """`function` reading `self._cbam_call` where it read `self.<child>`."""
    copy = types.FunctionType(
        _renamed_code(function.__code__, child),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _renamed_code(code: types.CodeType, child: str) -> types.CodeType:
    return code.replace(
        co_names=tuple(_REDIRECTED if name == child else name for name in code.co_names),
        co_consts=tuple(
            _renamed_code(c, child) if isinstance(c, types.CodeType) else c for c in code.co_consts
        ),
        # Scripting reads a function's source through its file name: it must find none rather than the
        # original's, which has no attention in it.
        co_filename=f"<cbam: {code.co_name} with attention at {child}>",
    )


def _reduce_ex(self, protocol):
    """Pickle and copy by the importable base and the route: the class itself has no importable name."""
    cls = type(self)
    if not is_last_refined(self):
        raise TypeError(f"{cls.__name__} was made of a class with attention; undo that before pickling")
    make, _, *state = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if make is not _NEW_OBJECT:
        raise TypeError(f"{cls.__name__} pickles itself in its own way; detach the attention first")
    return _refined_instance, (cls._cbam_base, cls._cbam_route), *state


def _refined_instance(base: type[nn.Module], route: Route) -> nn.Module:
    cls = refined_class(base, route)
    return cls.__new__(cls)
