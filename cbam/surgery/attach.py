"""Put attention into a model in place, take it out again, and say where it can go."""

import difflib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from cbam.errors import AttachError, InputError
from cbam.nn import CBAM
from cbam.surgery import graph
from cbam.surgery.route import SLOT, Route, Unroutable, graph_route, is_refined, refine, refined_class, restore
from cbam.surgery.trial import Bench, Misfit, Value, static_channels, without_hooks

_log = logging.getLogger("cbam")
_IMAGE_SIZES = ((64, 96), (224, 256), (299, 331))
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"}


@dataclass(frozen=True)
class Site:
    """One place of a model, and whether attention goes there.

    Attributes:
        name: the block, as in `named_modules`.
        channels: of the feature map there; None where it is not known.
        why: where in the block the attention runs, or why it does not.
        default: whether `attach` without `where` takes it.
        attached: whether it has attention now.
        dims: dimensions of the feature map (4 for images).
        route: how the block's forward reaches the attention; None where it cannot.
    """

    name: str
    channels: int | None
    why: str
    default: bool = False
    attached: bool = False
    dims: int = 4
    route: Route | None = None

    def __str__(self) -> str:
        state = "attached" if self.attached else "free" if self.default else "left out"
        return f"{self.name or '(the model)'}: {state}, {self.channels or '?'} channels, {self.why}"


def sites(model: nn.Module) -> list[Site]:
    """Every residual block of `model`: where attention goes, has gone, or why it is left out; changes nothing.

    Blocks are recognised by what their own forward computes: a shortcut added to a branch that holds a
    convolution and a nonlinearity. Every site was run alone, on a copy, at two sizes.
    """
    found: list[Site] = []
    with_site: set[type] = set()
    plain: list[tuple[str, nn.Module]] = []
    for name, block in _blocks(model):
        places = _places(name, block)
        if any(s.default for s in places):
            with_site.add(_plain_class(block))
        if not places:
            plain.append((name, block))
        found += places
    found += [Site(n, None, "no skip connection") for n, b in plain if _plain_class(b) in with_site]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda site: order[site.name])


def attach(
    model: nn.Module,
    where: str | Callable[[str, nn.Module], bool] | None = None,
    attention: Callable[[int], nn.Module] = CBAM,
    *,
    start: str = "identity",
) -> nn.Module:
    """Put attention into `model`, in place, before the add of every residual block; returns `model`.

    No key of the model changes and no weight is touched: the attention of a block lives beside its children
    under the name `cbam`. With `start="identity"` the outputs stay bit-equal.

    Args:
        model: not yet compiled, scripted or wrapped for distribution.
        where: a regular expression that a whole module name must match, or `(name, module) -> bool`. It
            chooses among the residual blocks that `sites(model)` lists; where it matches none of them, the
            modules it matches get attention on their output.
        attention: `channels -> module` of the same input and output shape.
        start: "identity", which needs `identity_()` on the attention; or "paper", its own initialisation.

    Raises:
        AttachError: nothing matches, attention is there already, or it cannot be put in; nothing is changed.
        InputError: an unknown `start`.
    """
    if start not in ("identity", "paper"):
        raise InputError(f'start must be "identity" or "paper", got {start!r}')
    _refuse_wrapped(model)
    chosen = _choose(model, where)
    modules = dict(model.named_modules())
    parts = [(modules[s.name], s, _build(modules[s.name], s, attention, start)) for s in chosen]
    done: list[nn.Module] = []
    try:
        for block, site, part in parts:
            assert site.route is not None
            refine(block, site.route, part)
            done.append(block)
    except BaseException:
        for block in done:
            restore(block)
        raise
    _log.info("attention attached at %d places: %s", len(chosen), ", ".join(s.name for s in chosen))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take all attention out of `model`, in place: outputs, keys, hooks and classes are as before `attach`.

    Raises:
        AttachError: the model has none, or is wrapped.
    """
    _refuse_wrapped(model)
    blocks = [m for m in model.modules() if is_refined(m)]
    if not blocks:
        raise AttachError("nothing to detach: the model has no attached attention")
    for block in blocks:
        restore(block)
    return model


def attached(model: nn.Module) -> dict[str, nn.Module]:
    """The attention of `model` by the name of its block, in the order of `named_modules`."""
    return {name: getattr(block, SLOT) for name, block in model.named_modules() if is_refined(block)}


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that might hold a residual add of their own, outside attached attention."""
    inside = {m for part in attached(model).values() for m in part.modules()}
    for name, module in model.named_modules():
        own_forward = type(module).forward not in (nn.Sequential.forward, nn.Module.forward)
        if own_forward and module not in inside and graph.convolutions(module) and any(module.children()):
            yield name, module


def _places(name: str, block: nn.Module) -> list[Site]:
    """The residual adds of one block, from its output back."""
    if is_refined(block):
        return [_attached_site(name, block)]
    try:
        traced = graph.trace(block)
    except Exception as error:  # a forward may refuse to be traced in any way it likes
        if not graph.adds_values(block):
            return []
        return [Site(name, None, f"cannot be traced: {str(error).splitlines()[0][:120]}")]
    trunk = graph.Trunk(block, traced)
    places: list[Site] = []
    for add in trunk.adds:
        places.append(_place(name, block, traced, trunk, add, taken=any(s.default for s in places)))
    if not places and "partial" in trunk.note:
        places.append(Site(name, None, trunk.note))
    return places


def _attached_site(name: str, block: nn.Module) -> Site:
    route: Route = vars(type(block))["_cbam_route"]
    channels = getattr(getattr(block, SLOT), "channels", None)
    return Site(name, channels, str(route), default=True, attached=True, route=route)


def _place(name: str, block: nn.Module, traced: fx.Graph, trunk: graph.Trunk, add: graph.Add, taken: bool) -> Site:
    if taken:
        return Site(name, None, add.reason or "a second add in one block")
    if add.reason and "linear" not in add.reason:
        return Site(name, None, add.reason)
    try:
        bench = Bench(block, traced)
    except Misfit as misfit:
        return _unrun(name, block, trunk, add, misfit)
    try:
        value = bench.value_at(add)
    except Misfit as misfit:
        return Site(name, None, str(misfit))
    if hasattr(block, SLOT):
        return Site(name, value.channels, f"has an attribute {SLOT!r} of its own")
    refusals = []
    for route in _routes(block, traced, trunk, add):
        try:
            if isinstance(route, Unroutable):
                raise route
            bench.check(route, value)
        except (Misfit, Unroutable) as refusal:
            refusals.append(str(refusal))
        else:
            why = str(route) + (f" ({add.reason})" if add.reason else "")
            return Site(name, value.channels, why, default=not add.reason, dims=value.dims, route=route)
    return Site(name, value.channels, "; ".join(refusals))


def _unrun(name: str, block: nn.Module, trunk: graph.Trunk, add: graph.Add, misfit: Misfit) -> Site:
    """A block that does not run alone: taken where its last layer fixes the channel axis by definition."""
    for child, when in trunk.steps_back(add.branch):
        value = static_channels(block.get_submodule(child)) if when == "after" else None
        if value and "." not in child and not add.reason and not hasattr(block, SLOT):
            try:
                refined_class(type(block), Route(when, child))
            except Unroutable:
                continue
            why = f"{when} {child} (not run: {misfit})"
            return Site(name, value.channels, why, default=True, dims=value.dims, route=Route(when, child))
    return Site(name, None, str(misfit))


def _routes(
    block: nn.Module, traced: fx.Graph, trunk: graph.Trunk, add: graph.Add
) -> Iterator[Route | Unroutable]:
    calls = [str(n.target) for n in traced.nodes if n.op == "call_module"]
    for child, when in trunk.steps_back(add.branch):
        if "." in child:
            yield Unroutable(f"{child} is no direct child")
        elif calls.count(child) != 1:
            yield Unroutable(f"{child} is called {calls.count(child)} times")
        else:
            yield Route(when, child)
    try:
        yield graph_route(block, add.branch.name)
    except Unroutable as refusal:
        yield refusal


def _choose(model: nn.Module, where: str | Callable[[str, nn.Module], bool] | None) -> list[Site]:
    found = sites(model)
    if where is None:
        chosen = [s for s in found if s.default]
        if not chosen:
            reasons = "; ".join(f"{s.name}: {s.why}" for s in found[:3]) or "it has no residual block with a convolution"
            raise AttachError(f"no place for attention in {type(model).__name__} ({reasons}); say where=...")
    else:
        names = [name for name, module in model.named_modules() if _matcher(where)(name, module)]
        chosen = _chosen_by(names, found, model, where)
    if already := [s.name for s in chosen if s.attached]:
        raise AttachError(
            f"attention is attached already at {', '.join(already[:4])}"
            f"{' and elsewhere' if len(already) > 4 else ''}; cbam.detach(model) first"
        )
    return chosen


def _chosen_by(names: list[str], found: list[Site], model: nn.Module, where) -> list[Site]:
    usable = [s for s in found if s.name in names and s.route]
    if usable:
        return usable
    hopeless = [s for s in found if s.name in names and s.why != "no skip connection"]
    if hopeless:
        raise AttachError(f"attention cannot go into {hopeless[0].name}: {hopeless[0].why}; nothing was changed")
    if not names:
        known = [name for name, _ in model.named_modules() if name]
        near = difflib.get_close_matches(str(where), known, 3, cutoff=0.0) if isinstance(where, str) else known[:3]
        raise AttachError(
            f"where={where!r} matches no module name as a whole; nearest: {', '.join(near)}; see cbam.sites(model)"
        )
    return _output_sites(model, names)


def _matcher(where: str | Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    if callable(where):
        return where
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise InputError(f"where={where!r} is no regular expression: {error}") from None
    return lambda name, module: pattern.fullmatch(name) is not None


def _output_sites(model: nn.Module, names: list[str]) -> list[Site]:
    """Sites on the outputs of modules that are no residual blocks."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules[name]
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise AttachError(
                f"{name} is a {type(module).__name__}: conversion to SyncBatchNorm would drop attention from it; "
                "name the module around it, or the activation after it"
            )
        if type(module).forward is nn.Module.forward:
            raise AttachError(f"{name} is a {type(module).__name__}, which has no forward; name a module inside it")
        if hasattr(module, SLOT):
            raise AttachError(f"{name} has an attribute {SLOT!r} already; nothing was changed")
    values = {n: v for n in names if (v := static_channels(modules[n]))}
    if len(values) < len(names):
        values |= _observed(model, [n for n in names if n not in values])
    return [
        Site(n, values[n].channels, "on its output", dims=values[n].dims, route=Route("output")) for n in names
    ]


def _observed(model: nn.Module, names: list[str]) -> dict[str, Value]:
    """Channels at the outputs of modules, by running the model on images of two sizes."""
    failure = ""
    for sizes in _IMAGE_SIZES:
        try:
            runs = [_output_shapes(model, names, size) for size in sizes]
        except Exception as error:  # a model refuses what it cannot take in any way it likes
            failure = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            continue
        for name in names:
            a, b = (run.get(name) for run in runs)
            if a is None or b is None or len(a) < 3 or a[1] != b[1] or a[2:] == b[2:] != (1,) * (len(a) - 2):
                raise AttachError(f"the output of {name} is no (N, C, H, W) map: {a} and {b} on two image sizes")
        return {name: Value(runs[0][name][1], len(runs[0][name])) for name in names}
    raise AttachError(f"the model could not be run to learn the channels of {names[0]}: {failure}")


def _output_shapes(model: nn.Module, names: list[str], size: int) -> dict[str, tuple[int, ...]]:
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if first is None:
        raise AttachError("the model has no convolution")
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(model.named_modules())

    def note(name: str):
        return lambda module, args, out: shapes.update({name: tuple(out.shape)}) if isinstance(out, Tensor) else None

    modes = {m: m.training for m in modules.values()}
    x = torch.zeros(1, first.in_channels, *(size,) * len(first.kernel_size)).to(first.weight)
    with without_hooks(model), torch.no_grad():
        handles = [modules[name].register_forward_hook(note(name)) for name in names]
        try:
            model.eval()(x)
        finally:
            for m, mode in modes.items():
                m.training = mode
            for handle in handles:
                handle.remove()
    return shapes


def _build(block: nn.Module, site: Site, attention: Callable[[int], nn.Module], start: str) -> nn.Module:
    """The attention of one site: made, started, run once, and fitted to its host."""
    assert site.channels is not None
    try:
        part = attention(site.channels)
    except Exception as error:
        raise AttachError(f"attention({site.channels}) for {site.name} failed: {error}; nothing was changed") from error
    if not isinstance(part, nn.Module):
        raise AttachError(f"attention({site.channels}) gave a {type(part).__name__}, expected an nn.Module")
    if start == "identity":
        _start_at_identity(part)
    _check_part(part, site, start)
    host = next((p for p in block.parameters() if p.dtype.is_floating_point), None)
    if host is not None:
        part = part.to(device=host.device, dtype=host.dtype)
        if host.dim() == 4 and host.is_contiguous(memory_format=torch.channels_last) and not host.is_contiguous():
            part = part.to(memory_format=torch.channels_last)
    return part.train(block.training)


def _start_at_identity(part: nn.Module) -> None:
    identity = getattr(part, "identity_", None)
    if callable(identity):
        identity()
    elif isinstance(part, nn.Sequential):
        for step in part:
            _start_at_identity(step)
    else:
        raise AttachError(
            f'start="identity" needs {type(part).__name__}.identity_(), which makes it compute its input; '
            'define it, or take start="paper"'
        )


def _check_part(part: nn.Module, site: Site, start: str) -> None:
    """Run the attention alone: a wrong shape or a start that is none is found before anything changes."""
    weight = next(part.parameters(), None)
    if weight is not None and weight.is_meta:
        return
    x = torch.linspace(-2, 2, 15 * site.channels)
    x = x.reshape(1, site.channels, *((15,), (5, 3), (5, 3, 1))[site.dims - 3])
    modes = {m: m.training for m in part.modules()}
    try:
        with torch.no_grad():
            out = part.eval()(x if weight is None else x.to(weight))
    except Exception as error:
        raise AttachError(
            f"{type(part).__name__} refuses the {site.dims}-D map of {site.name}: {error}; nothing was changed"
        ) from error
    finally:
        for m, mode in modes.items():
            m.training = mode
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise AttachError(f"{type(part).__name__} turns {tuple(x.shape)} into {getattr(out, 'shape', type(out))}")
    if start == "identity" and not torch.equal(out, x.to(out)):
        raise AttachError(f"{type(part).__name__}.identity_() does not make it compute exactly its input")


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"at {name!r}" if name else "as the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(f"found a scripted or traced module {where}: attach before torch.jit")
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise AttachError(f"found a compiled module {where}: attach first, then torch.compile")
        if kind in _WRAPPERS or kind.startswith("FSDP"):
            raise AttachError(f"found {kind} {where}: attach before wrapping for distribution")
        if callable(getattr(module, "weight", None)):
            raise AttachError(f"found a quantised {kind} {where}: attach, then quantise")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise AttachError(f"found an uninitialised {kind} {where}: run the model once, then attach")


def _plain_class(block: nn.Module) -> type:
    return vars(type(block)).get("_cbam_base", type(block))
