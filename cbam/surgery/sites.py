"""Where attention can go in a model: the residual blocks, and the outputs of other modules."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cbam.errors import AttachError, InputError, first_line
from cbam.surgery import bytecode, graph, tracing
from cbam.surgery.bytecode import UnroutableError, is_straight
from cbam.surgery.effects import DRAWS, rng_restored, state_restored
from cbam.surgery.route import (
    MODES,
    SLOT,
    Route,
    child_route,
    graph_route,
    is_refined,
    plain_class,
    refine,
    refined_class,
    restore,
)
from cbam.surgery.trial import (
    Bench,
    MisfitError,
    Probe,
    Value,
    static_channels,
    traced_on_an_example,
    without_hooks,
)

# Sizes of the inputs to run a model on, by number of spatial dimensions.
_INPUT_SIZES = {
    1: ((64, 96), (1024, 1536)),
    2: ((64, 96), (224, 256), (299, 331)),
    3: ((32, 48), (64, 96)),
}
_ON_INSTANCE = "a forward assigned to the instance, which cannot be redirected"


@dataclass(frozen=True)
class Site:
    """One place in a model, and whether attention goes there.

    Attributes:
        name: the block, as in `named_modules`.
        channels: of the feature map there; None if unknown.
        why: where in the block the attention runs, or why it does not.
        default: whether `attach` without `where` takes it.
        attached: whether it has attention now.
        dims: dimensions of the feature map (4 for images).
        route: how the forward of the block calls the attention; None if it cannot.
        name_taken: whether the only obstacle is that the block has an attribute with the attention's name.
    """

    name: str
    channels: int | None
    why: str
    default: bool = False
    attached: bool = False
    dims: int = 4
    route: Route | None = field(default=None, repr=False)
    name_taken: bool = field(default=False, repr=False)

    def __str__(self) -> str:
        state = "attached" if self.attached else "free" if self.default else "left out"
        width = "" if self.channels is None else f"{self.channels} channels, "
        tail = ", one operation with the norm, the add and the ReLU" if self.route and self.route.tail else ""
        return f"{self.name or '(the model)'}: {state}, {width}{self.why}{tail}"


def label(name: str) -> str:
    """The name of a module for messages; that of the model itself is empty."""
    return name or "the model"


def sites(model: nn.Module) -> list[Site]:
    """List the residual blocks of `model`: where attention goes, or why it does not; changes nothing.

    Blocks are recognised by what their own forward computes: a shortcut added to a branch that holds a
    convolution and a nonlinearity. Every site is checked by running a copy of its block at two sizes.
    """
    check_module(model)
    found: list[Site] = []
    with_site: set[type] = set()
    plain: list[tuple[str, nn.Module]] = []
    for name, block in _blocks(model):
        places = _sites_of(name, block)
        if any(s.default for s in places):
            with_site.add(plain_class(block))
        if not places:
            plain.append((name, block))
        found += places
    found += [Site(n, None, "no skip connection") for n, b in plain if plain_class(b) in with_site]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda site: order[site.name])


def check_module(model: nn.Module) -> None:
    """Raise unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expected an nn.Module, got {type(model).__name__}; build one with cbam.build(name)"
        )


def attached(model: nn.Module) -> dict[str, nn.Module]:
    """The attention of `model` by the name of its block, in the order of `named_modules`."""
    return {name: getattr(block, SLOT) for name, block in model.named_modules() if is_refined(block)}


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules outside attached attention that may have a residual add in their own forward."""
    inside = {m for part in attached(model).values() for m in part.modules()}
    for name, module in model.named_modules():
        own_forward = type(module).forward not in (nn.Sequential.forward, nn.Module.forward)
        may_add = own_forward and any(module.children()) and graph.convolutions(module) > 0
        if module not in inside and (may_add or is_refined(module)):
            yield name, module


def _sites_of(name: str, block: nn.Module) -> list[Site]:
    """A site for each residual add of a block, the last add first."""
    if is_refined(block):
        return _attached_sites(name, block)
    if isinstance(block, fx.GraphModule):
        return [Site(name, None, "a torch.fx graph, which regenerates its forward: attach, then trace")]
    try:
        traced = tracing.trace_with_effects(block, training=False)
    except Exception as error:  # tracing a user's forward can raise anything
        if not tracing.adds_values(block):
            return []
        traced = traced_on_an_example(block)
        if traced is None:
            return [Site(name, None, f"cannot be traced: {first_line(error)}")]
    trunk = graph.Trunk(block, *traced)
    places: list[Site] = []
    for add in trunk.adds:
        places.append(_site(name, block, trunk, add, has_site=any(s.default for s in places)))
    if not places and trunk.note:
        places.append(Site(name, None, trunk.note))
    return places


def _attached_sites(name: str, block: nn.Module) -> list[Site]:
    """The sites of a block with attention, found on a copy without it."""
    route: Route = type(block)._cbam_route  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(Exception):  # copying a user's objects can raise anything
        plain = copy.deepcopy(block)
        restore(plain)
        places = [replace(s, attached=s.route == route) for s in _sites_of(name, plain)]
        if any(s.attached for s in places):
            return places
    return [
        Site(name, getattr(getattr(block, SLOT), "channels", None), str(route), attached=True, route=route)
    ]


def _site(name: str, block: nn.Module, trunk: graph.Trunk, add: graph.Add, has_site: bool) -> Site:
    if has_site:
        return Site(name, None, "a second add in one block")
    if add.reason and not add.on_request:
        return Site(name, None, add.reason)
    try:
        bench = Bench(block, trunk.graph)
    except MisfitError as misfit:
        return _unchecked_site(name, block, trunk, add, misfit)
    try:
        value = bench.value_at(add)
    except MisfitError as misfit:
        return Site(name, None, str(misfit))
    if hasattr(block, SLOT):
        why = f"has an attribute {SLOT!r} of its own; rename it"
        return Site(name, value.channels, why, name_taken=not add.reason)
    refusals = []
    for route in _routes(block, trunk, add):
        try:
            if isinstance(route, UnroutableError):
                raise route
            bench.check(route, value)
        except (MisfitError, UnroutableError) as refusal:
            refusals.append(str(refusal))
        else:
            why = str(route) + (f" ({add.reason})" if add.reason else "")
            return Site(name, value.channels, why, default=not add.reason, dims=value.dims, route=route)
    return Site(name, value.channels, "; ".join(refusals))


def _unchecked_site(
    name: str, block: nn.Module, trunk: graph.Trunk, add: graph.Add, misfit: MisfitError
) -> Site:
    """The site of a block that does not run on its own: free if its last layer determines the channels."""
    if "forward" in vars(block):
        return Site(name, None, f"has {_ON_INSTANCE}")
    for child, when in trunk.steps_back(add.branch):
        value = static_channels(block.get_submodule(child)) if when == "after" else None
        if value and "." not in child and not add.reason and not hasattr(block, SLOT):
            try:
                route = child_route(block, when, child)
                refined_class(type(block), route)
            except UnroutableError:
                continue
            why = f"{when} {child} (not run: {misfit})"
            return Site(name, value.channels, why, default=True, dims=value.dims, route=route)
    return Site(name, None, str(misfit))


def _routes(block: nn.Module, trunk: graph.Trunk, add: graph.Add) -> Iterator[Route | UnroutableError]:
    calls = [str(n.target) for n in trunk.graph.nodes if n.op == "call_module"]
    for child, when in trunk.steps_back(add.branch):
        if "." in child:
            yield UnroutableError(f"{child} is no direct child")
        elif calls.count(child) != 1:
            yield UnroutableError(f"{child} is called {calls.count(child)} times")
        else:
            yield _with_tail(child_route(block, when, child), block, trunk, add)
    try:
        yield graph_route(block, add.branch.name)
    except UnroutableError as refusal:
        yield refusal


def _with_tail(route: Route, block: nn.Module, trunk: graph.Trunk, add: graph.Add) -> Route:
    """`route`, marked as a tail if the rest of the block can run as one operation, also in training."""
    relu = trunk.tail(add)
    if relu is None or route.child != add.branch.target or not is_straight(type(block), route.child):
        return route
    name = str(relu.target) if relu.op == "call_module" else ""
    try:
        trained = graph.Trunk(block, *tracing.trace_with_effects(block, training=True))
    except Exception:  # tracing a user's forward can raise anything
        return route
    unpredictable = {DRAWS, tracing.BRANCHES}.intersection(trunk.effects + trained.effects)
    if unpredictable or MODES & bytecode.names(type(block)):
        return route  # if the block drops a deferred branch, its BatchNorm would miss that batch
    same = [a for a in trained.adds if a.branch.target == route.child and trained.tail(a) is not None]
    if not same or "." in name:
        return route
    shortcut = trunk.shortcut(add)
    joins = {trained.shortcut(a) for a in same} == {shortcut} and is_straight(type(block), shortcut)
    return replace(route, tail=True, relu=name, shortcut=shortcut if joins else "")


def output_sites(model: nn.Module, names: list[str]) -> list[Site]:
    """Sites on the outputs of modules that are not residual blocks."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules[name]
        if isinstance(module, _NormBase):
            raise AttachError(
                f"{label(name)} is a {type(module).__name__}: converting it to SyncBatchNorm would drop "
                "attention; name the module around it, or the activation after it"
            )
        if type(module).forward is nn.Module.forward:
            raise AttachError(
                f"{label(name)} is a {type(module).__name__}, which has no forward; name a module inside it"
            )
        if "forward" in vars(module):
            raise AttachError(f"{label(name)} has {_ON_INSTANCE}")
        if hasattr(module, SLOT):
            raise AttachError(f"{label(name)} already has an attribute {SLOT!r}; nothing was changed")
    values = {n: v for n in names if (v := static_channels(modules[n]))}
    if len(values) < len(names):
        values |= _observed_values(model, [n for n in names if n not in values])
    return [
        Site(n, values[n].channels, "on its output", dims=values[n].dims, route=Route("output"))
        for n in names
    ]


def _observed_values(model: nn.Module, names: list[str]) -> dict[str, Value]:
    """The outputs of modules, observed by running the model on inputs of two sizes."""
    first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if first is None:
        raise AttachError("the model has no convolution, so its input is unknown")
    dim, failure = len(first.kernel_size), ""
    for sizes in _INPUT_SIZES[dim]:
        try:
            inputs = [torch.zeros(1, first.in_channels, *(size,) * dim).to(first.weight) for size in sizes]
            runs = [_output_shapes(model, names, x) for x in inputs]
        except Exception as error:  # running a user's model can raise anything
            failure = first_line(error)
            continue
        return {name: _fixed_channels(name, *(run[name] for run in runs)) for name in names}
    raise AttachError(f"the model could not be run to find the channels of {label(names[0])}: {failure}")


def _fixed_channels(name: str, *runs: list[torch.Size]) -> Value:
    if not all(runs):
        raise AttachError(f"{label(name)} is not called in the forward of the model; nothing was changed")
    (a, *more), (b, *_) = (map(tuple, run) for run in runs)
    if more:
        raise AttachError(
            f"attention after {label(name)} would run {len(more) + 1} times in one forward; "
            "name the module around it"
        )
    pooled = set(a[2:]) == {1}
    if len(a) < 3 or a[1] != b[1] or (a[2:] == b[2:] and not pooled):
        raise AttachError(
            f"the output of {label(name)} is not an (N, C, H, W) map: {a}, {b} for inputs of two sizes"
        )
    return Value(a[1], len(a))


def _output_shapes(model: nn.Module, names: list[str], x: Tensor) -> dict[str, list[torch.Size]]:
    """The shapes that attention on the output of the named modules would get in one run, in eval mode.

    Probes are attached for this run only, and no hooks of the user fire.
    """
    probes = {name: Probe() for name in names}
    modules = dict(model.named_modules())
    with without_hooks(model), torch.no_grad(), rng_restored(), contextlib.ExitStack() as stack:
        for m in modules.values():
            stack.enter_context(state_restored(m))  # its mode included
        for name, probe in probes.items():
            refine(modules[name], Route("output"), probe)
            stack.callback(restore, modules[name])
        model.eval()(x)
    return {name: probe.shapes for name, probe in probes.items()}
