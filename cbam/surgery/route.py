"""Attach attention to a block's branch without changing a child, a key or a hook.

The block's class is replaced by a subclass of the same name. Its forward is the block's own code with one
call redirected: `self.bn3(x)` runs as `self._cbam_call(x)`, which is `self.cbam(self.bn3(x))`. One name in
the code object is changed, so no source text is needed, and the branches, closures and helper methods of the
original are kept. Children are untouched, so conversion to SyncBatchNorm, hooks and state dicts work as
before. If no child can be redirected, the forward is generated from the block's traced graph.
"""

import abc
import contextlib
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from cbam.errors import first_line
from cbam.nn.tail import begin, begin_shortcut, settled, watched
from cbam.surgery import bytecode
from cbam.surgery.bytecode import UnroutableError
from cbam.surgery.tracing import trace_with_effects

SLOT = "cbam"  # the attribute that holds the attention, as in the authors' released checkpoints
_REDIRECTED = "_cbam_call"
_SHORTCUT = "_cbam_shortcut"
_OWN = frozenset(vars(nn.Module()))  # `training` and the dicts of children
MODES = {"is_autocast_enabled", "is_autocast_cpu_enabled", "is_grad_enabled", "is_inference_mode_enabled"}
_NEW_OBJECT = object().__reduce_ex__(2)[0]  # what rebuilds an object that does not pickle itself


@dataclass(frozen=True)
class Route:
    """Where in a block the attention runs.

    Attributes:
        when: "after" or "before" the call of `child`; on the block's "output"; or at a value of the block's
            "graph".
        child: the direct child whose call is redirected, or the name of the value in the graph.
        source: for "graph", the generated forward and the importable names it uses.
        tail: whether `child` is the norm at the end of the block, `relu(attention(norm(x)) + shortcut)`,
            which may run as one operation.
        relu: for a tail, the direct child that is its ReLU; empty if the code calls a function.
        shortcut: for a tail, the Sequential child that computes the shortcut, whose norm may be fused too.
        alias: the property through which the code calls `child`; empty if it uses the name of the child.
    """

    when: str
    child: str = ""
    source: str = ""
    names: tuple[tuple[str, str, str], ...] = ()
    tail: bool = False
    relu: str = ""
    shortcut: str = ""
    alias: str = ""

    def __str__(self) -> str:
        return (
            "on its output"
            if self.when == "output"
            else f"{self.when} {self.child}".replace("graph", "after")
        )


def refine(block: nn.Module, route: Route, attention: nn.Module) -> None:
    """Make `attention` part of `block`; `restore` is the exact inverse."""
    refined = refined_class(plain_class(block), route)  # first: if it fails, the block is unchanged
    block.add_module(SLOT, attention)
    block.__class__ = refined


def restore(block: nn.Module) -> None:
    """Remove the attention from `block`."""
    del block._modules[SLOT]
    block.__class__ = vars(type(block))["_cbam_base"]


@contextlib.contextmanager
def paused(block: nn.Module) -> Iterator[None]:
    """Context manager: `block` runs the code of its base class; the attention remains a child."""
    refined = type(block)
    block.__class__ = _class_without(vars(refined)["_cbam_base"], vars(refined)["_cbam_route"])
    try:
        yield
    finally:
        block.__class__ = refined


@functools.cache
def _class_without(base: type[nn.Module], route: Route) -> type[nn.Module]:
    """A class that computes what `base` does without the attention child: `base` itself if possible."""
    if route.when == "graph":
        return _subclass(base, {"forward": _generated_forward(route), SLOT: staticmethod(lambda x: x)})
    if base.forward is nn.Sequential.forward:
        return _subclass(base, {"forward": _forward_without})
    return base


def _forward_without(self, x):
    for name, child in self._modules.items():
        x = x if name == SLOT else child(x)
    return x


def is_refined(block: nn.Module) -> bool:
    """Whether `refine` attached attention to `block`; a slice of a refined Sequential has only its class."""
    return hasattr(type(block), "_cbam_route") and SLOT in block._modules


def is_last_refined(block: nn.Module) -> bool:
    """Whether a refined `block` still has the class that `refine` set, so that `restore` works."""
    return "_cbam_route" in vars(type(block))


def plain_class(block: nn.Module) -> type[nn.Module]:
    """The class that `block` has without attention."""
    return vars(type(block)).get("_cbam_base", type(block))


def refined_class(base: type[nn.Module], route: Route) -> type[nn.Module]:
    """The subclass of `base` that runs `self.cbam` at `route`; all blocks with the same code share it.

    Raises:
        UnroutableError: the code of `base` does not allow the route.
    """
    return _refined_class(base, route, tuple(bytecode.codes(base)))


@functools.cache
def _refined_class(base: type[nn.Module], route: Route, _: tuple[types.CodeType, ...]) -> type[nn.Module]:
    inherited: dict[type[nn.Module], dict[str, Any]] = {}
    if route.when == "graph":
        methods: dict[str, Any] = {"forward": _generated_forward(route)}
    elif route.when == "output":
        methods = {"forward": _output_forward(base)}
    else:
        redirected = {route.alias or route.child: _REDIRECTED}
        if route.shortcut:
            redirected[route.shortcut] = _SHORTCUT
        inherited = bytecode.redirected(base, redirected)
        methods = inherited.pop(base, {})
        methods[_REDIRECTED] = _redirected_call(route)
        if route.shortcut:
            methods[_SHORTCUT] = _redirected_shortcut(route.shortcut)
        if route.tail:
            methods["forward"] = _settling(methods.get("forward", base.forward))
    return _subclass(
        base,
        methods | {"_cbam_base": base, "_cbam_route": route, "__reduce_ex__": _reduce_ex},
        # `super()` in a method of `base` finds each of these just before the class it copies
        *(_subclass(c, inherited[c]) for c in base.__mro__ if c in inherited),
    )


class _Unregistered(nn.Module):
    """Keeps `__init_subclass__` of the bases after it from running: registries must not see the subclass."""

    def __init_subclass__(cls) -> None:
        pass


def _subclass(base: type, namespace: dict[str, Any], *others: type) -> type:
    """Create a subclass of `base` and `others`, named like `base`, without notifying registries."""
    kind = type(base)  # a metaclass may register classes too
    make = abc.ABCMeta if issubclass(kind, abc.ABCMeta) else type
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    subclass = make.__new__(kind, base.__name__, (_Unregistered, base, *others), namespace | named)
    subclass.__bases__ = (base, *others)
    return subclass


def child_route(block: nn.Module, when: str, child: str) -> Route:
    """The route before or after the call of a direct child, whichever name the code uses for it."""
    names = bytecode.names(type(block))
    if child not in names:
        for name in sorted(names):
            with contextlib.suppress(Exception):  # a property can raise anything
                known = isinstance(inspect.getattr_static(block, name), property)
                if known and getattr(block, name) is block._modules[child]:
                    return Route(when, child, alias=name)
    return Route(when, child)


def graph_route(block: nn.Module, value: str) -> Route:
    """A route through a forward generated from the graph of `block`, with attention on the value `value`.

    Raises:
        UnroutableError: the forward does something that a graph cannot express, its graphs in training and
            evaluation differ (as with dropout), or its graph uses an object that cannot be imported.
    """
    _check_lossless(block)
    code = [_with_attention(block, value, training) for training in (False, True)]
    if code[0].src != code[1].src:
        raise UnroutableError("its forward differs between training and evaluation")
    used = sorted(name for name in code[0].globals if re.search(rf"\b{name}\b", code[0].src))
    names = tuple(_importable(name, code[0].globals[name]) for name in used)
    return Route("graph", value, code[0].src, names)


def _check_lossless(block: nn.Module) -> None:
    """Raise if a trace would drop a `with`, a `try` or a default argument, or freeze a setting."""
    for parameter in inspect.signature(type(block).forward).parameters.values():
        if parameter.default is not parameter.empty:
            raise UnroutableError(
                f"its forward has a default for {parameter.name}, which a generated one would freeze"
            )
    own = {*bytecode.codes(type(block))}
    for code in bytecode.all_codes(type(block)):
        if bytecode.enters_context(code):
            raise UnroutableError("its forward enters a `with`, which a generated one would leave out")
        if code in own and bytecode.catches(code):
            raise UnroutableError("its forward has a `try`, which a generated one would leave out")
        if queried := sorted(MODES.intersection(code.co_names)):
            raise UnroutableError(f"its forward calls {queried[0]}, which a generated one would freeze")
        names = {*code.co_names}
        if "getattr" in names:
            texts = tuple(c for c in code.co_consts if isinstance(c, str) and c)
            names |= {*texts}
            if bytecode.formats_string(code):  # a computed name may begin with a string in the code
                names |= {name for name in dir(block) if name.startswith(texts)}
        for name in sorted(names - _OWN):
            if _is_setting(inspect.getattr_static(block, name, None)):
                raise UnroutableError(f"its forward reads self.{name}, which a generated one would freeze")


def _is_setting(value: Any) -> bool:
    """Whether a trace records the value of an attribute instead of the read."""
    code = isinstance(value, property | staticmethod | classmethod) or callable(value)
    return not (value is None or code or isinstance(value, Tensor | nn.Module))


def _with_attention(block: nn.Module, value: str, training: bool):
    try:
        graph, effects = trace_with_effects(block, training=training)
    except Exception as error:  # tracing a user's forward can raise anything
        mode = "training" if training else "evaluation"
        raise UnroutableError(f"its forward cannot be traced in {mode}: {first_line(error)}") from error
    if effects:
        raise UnroutableError(f"its forward {effects[0]}, which a generated one would leave out")
    node = next((n for n in graph.nodes if n.name == value), None)
    if node is None:
        raise UnroutableError("its forward differs between training and evaluation")
    _check_types(block, graph)
    with graph.inserting_after(node):
        attended = graph.call_module(SLOT, (node,))
    node.replace_all_uses_with(attended, delete_user_cb=lambda user: user is not attended)
    return graph.python_code("self")


def _check_types(block: nn.Module, graph: fx.Graph) -> None:
    """Raise if the graph contains the dtype or device of a tensor, which `to()` may change later."""
    values = tree_leaves([(n.args, n.kwargs) for n in graph.nodes])
    found = [value for value in values if isinstance(value, torch.dtype | torch.device)]
    codes = [*bytecode.all_codes(type(block))] if found else []
    written = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    for value in found:
        if str(value).rpartition(".")[2] not in written:
            raise UnroutableError(
                f"its forward reads {value} of a tensor, which a generated one would freeze"
            )


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
        return base.forward  # runs the children in order, and attention is the last child
    return _with_signature(base.forward, "{self}.cbam(_cbam_base.forward({given}))", _cbam_base=base)


def _redirected_call(route: Route) -> Callable:
    child = route.alias or route.child  # by property, since that may return another child later
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


def _redirected_shortcut(child: str) -> property:
    """The property that the code reads instead of `child`, to call it or to compare it with None."""

    def shortcut(self):
        layers = getattr(self, child)
        return None if layers is None else functools.partial(begin_shortcut, layers)

    return property(shortcut)


def _settling(forward: Callable) -> Callable:
    """`forward`, made to return a tensor even if a deferred value reached no ReLU."""
    return _with_signature(
        forward, "_cbam_settled(_cbam_plain({given}))", _cbam_settled=settled, _cbam_plain=forward
    )


def _with_signature(forward: Callable, body: str, **names: Any) -> Callable:
    """A function that returns `body` and has the parameters of `forward`, which tracers read from its code.

    In `body`, `{self}` is the first parameter and `{given}` all of them; `names` are its globals.
    """
    parameters = _parameters(forward)
    given = ", ".join(_ARGUMENT.get(p.kind, "{0}").format(p.name) for p in parameters)
    first = parameters[0].name + ("[0]" if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL else "")
    # The source only marks which parameters have defaults; their values are set below.
    shown = [p if p.default is p.empty else p.replace(default=None) for p in parameters]
    declared = inspect.Signature([p.replace(annotation=p.empty) for p in shown])
    source = f"def forward{declared}: return " + body.format(self=first, given=given)
    # No file has this name, so that scripting finds no source.
    exec(compile(source, f"<cbam: {getattr(forward, '__name__', 'forward')} with attention>", "exec"), names)
    function = names["forward"]
    optional = [p for p in parameters if p.default is not p.empty]
    function.__defaults__ = tuple(p.default for p in optional if p.kind in _POSITIONAL)
    function.__kwdefaults__ = {p.name: p.default for p in optional if p.kind not in _POSITIONAL}
    return function


def _parameters(forward: Callable) -> list[inspect.Parameter]:
    """The parameters of `forward`, `self` included; *args and **kwargs if it has no signature."""
    try:
        if found := [*inspect.signature(forward, follow_wrapped=False).parameters.values()]:
            return found
    except (TypeError, ValueError):
        pass
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [inspect.Parameter(name, kind) for name, kind in zip(("args", "kwargs"), kinds, strict=True)]


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ARGUMENT = {
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


def _reduce_ex(self, protocol):
    """Pickle and copy by base class and route, since the refined class cannot be imported."""
    cls = type(self)
    if not is_last_refined(self):
        raise TypeError(f"{cls.__name__} is derived from a class with attention; undo that before pickling")
    make, _, *state = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if make is not _NEW_OBJECT:
        raise TypeError(f"{cls.__name__} defines its own pickling; detach the attention first")
    return _refined_instance, (cls._cbam_base, cls._cbam_route), *state


def _refined_instance(base: type[nn.Module], route: Route) -> nn.Module:
    cls = refined_class(base, route)
    return cls.__new__(cls)
