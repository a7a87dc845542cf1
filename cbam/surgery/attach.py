"""Put attention into a model in place, take it out again, or bypass it."""

import contextlib
import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cbam.errors import AttachError, InputError, NoPlaceError
from cbam.nn import ATTENTION, CBAM
from cbam.surgery.effects import eval_mode
from cbam.surgery.route import is_last_refined, is_refined, paused, refine, restore
from cbam.surgery.sites import Site, called, check_module, output_sites, sites
from cbam.surgery.trial import Value

_log = logging.getLogger("cbam")
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
# What `program.module()` and torch.export.unflatten make.
_EXPORTED = {"_StatefulGraphModule", "UnflattenedModule"}


def attach(
    model: nn.Module,
    where: str | Callable[[str, nn.Module], bool] | None = None,
    attention: str | Callable[[int], nn.Module] = CBAM,
    *,
    start: str = "identity",
) -> nn.Module:
    """Put attention into `model`, in place, before the add of every residual block; returns `model`.

    No key of the model changes and no weight is touched: the attention of a block lives beside its children
    under the name `cbam`. With `start="identity"` the outputs stay bit-identical
    (where fused kernels run, see docs/kernels.md: in float32 and float64 on a CPU, elsewhere to rounding).

    Args:
        model: not yet compiled, scripted or wrapped for distribution.
        where: a regular expression that a whole module name must match, or `(name, module) -> bool`. It
            chooses among the residual blocks that `sites(model)` lists; where it matches none of them, the
            modules it matches get attention on their output.
        attention: `channels -> module` of the same input and output shape, or its name on the command line,
            such as "eca". One that takes `dim` is told it where the map has one spatial dimension or three.
        start: "identity", which needs `identity_()` on the attention; or "paper", its own initialisation, as
            `cbam.build` begins.

    Raises:
        AttachError: nothing matches, attention is there already, or it cannot be put in; nothing is changed.
        InputError: an unknown `start` or name of an attention, or a `where` that is none.
    """
    made = _attention(attention)
    if start not in ("identity", "paper"):
        raise InputError(f'start must be "identity" or "paper", got {start!r}')
    _refuse_wrapped(model)
    chosen = _choose(model, where)
    modules = dict(model.named_modules())
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        # so that the tensors can be trained later
        parts = [(modules[s.name], s, _build(modules[s.name], model, s, made, start)) for s in chosen]
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
    _log.info("attention attached at %d places: %s", len(chosen), ", ".join(called(s.name) for s in chosen))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take all attention out of `model`, in place: outputs, keys, hooks and classes are as before `attach`.

    Raises:
        AttachError: the model has none, or is wrapped.
    """
    for block in _refined_blocks(model, "detach"):
        restore(block)
    return model


@contextlib.contextmanager
def bypassed(model: nn.Module) -> Iterator[nn.Module]:
    """For a `with`: `model` computes, bit for bit, what it would after `detach`; then as before again.

    Its weights and keys stay what they are, those of the attention among them.

    Raises:
        AttachError: the model has no attention, or is wrapped.
    """
    with contextlib.ExitStack() as stack:
        for block in _refined_blocks(model, "bypass"):
            stack.enter_context(paused(block))
        yield model


def _refined_blocks(model: nn.Module, verb: str) -> list[nn.Module]:
    """The blocks with attention, once it is known that it can be taken out of all of them."""
    _refuse_wrapped(model, verb)
    blocks = {name: m for name, m in model.named_modules() if is_refined(m)}
    if not blocks:
        raise AttachError(
            f"nothing to {verb}: the model has no attached attention, or it is bypassed already"
        )
    for name, block in blocks.items():
        if not is_last_refined(block):
            raise AttachError(
                f"cannot {verb}: the class of {called(name)} was changed after attaching, to "
                f"{type(block).__name__}; undo that first (fully_shard, a parametrisation, ...)"
            )
    return list(blocks.values())


def _choose(model: nn.Module, where: str | Callable[[str, nn.Module], bool] | None) -> list[Site]:
    found = sites(model)
    if where is None:
        for site in found:
            if site.name_taken:
                raise AttachError(f"{called(site.name)} {site.why}; nothing was changed")
        chosen = [s for s in found if s.default]
        if not chosen:
            reasons = (
                "; ".join(f"{called(s.name)}: {s.why}" for s in found[:3])
                or "it has no residual block with a convolution"
            )
            raise NoPlaceError(f"no place for attention in {type(model).__name__} ({reasons}); say where=...")
    else:
        matches = _matcher(where)
        names = [name for name, module in model.named_modules() if matches(name, module)]
        chosen = _chosen_by(names, found, model, where)
    if already := [called(s.name) for s in chosen if s.attached]:
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
        raise AttachError(
            f"attention cannot go into {called(hopeless[0].name)}: {hopeless[0].why}; nothing was changed"
        )
    if not names:
        known = [name for name, _ in model.named_modules() if name]
        near = (
            difflib.get_close_matches(str(where), known, 3, cutoff=0.0)
            if isinstance(where, str)
            else known[:3]
        )
        meant = (
            f"; did you mean attention={where!r}?" if isinstance(where, str) and where in ATTENTION else ""
        )
        raise AttachError(
            f"where={where!r} matches no whole module name; nearest: {', '.join(near)}; see cbam.sites(model)"
            f"{meant}"
        )
    return output_sites(model, names)


def _matcher(where: str | Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    if isinstance(where, nn.Module) or (isinstance(where, type) and issubclass(where, nn.Module)):
        raise InputError("a module was given as the second argument, which is where; give attention=...")
    if callable(where):
        return where
    if not isinstance(where.pattern if isinstance(where, re.Pattern) else where, str):
        raise InputError(
            f"where must be a regular expression or (name, module) -> bool, got {where!r:.80}; "
            'several names are one expression, "layer1|layer2"'
        )
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise InputError(f"where={where!r} is no regular expression: {error}") from None
    return lambda name, module: pattern.fullmatch(name) is not None


def _attention(attention: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    if isinstance(attention, str):
        if attention in ATTENTION:
            return ATTENTION[attention]
        near = ", ".join(difflib.get_close_matches(attention.lower(), ATTENTION, 3, 0.3) or ATTENTION)
        raise InputError(f"unknown attention {attention!r}; nearest: {near}")
    if isinstance(attention, nn.Module) or not callable(attention):
        raise InputError(
            f"attention must be a name or make a module for a number of channels, such as cbam.CBAM; "
            f"got a {type(attention).__name__}"
        )
    return attention


def _build(
    block: nn.Module, model: nn.Module, site: Site, attention: Callable[[int], nn.Module], start: str
) -> nn.Module:
    """The attention of one site: made, started, run once, and moved to the device and dtype of its block."""
    channels = site.channels
    assert channels is not None
    try:
        part = attention(channels) if site.dims == 4 else _of_dim(attention, channels, site.dims - 2)
    except Exception as error:
        raise AttachError(
            f"attention({channels}) for {called(site.name)} failed: {error}; nothing was changed"
        ) from error
    if not isinstance(part, nn.Module):
        raise AttachError(f"attention({channels}) gave a {type(part).__name__}, expected an nn.Module")
    if start == "identity":
        _start_at_identity(part)
    _check_part(part, called(site.name), Value(channels, site.dims), start)
    around = (p for m in (block, model) for p in m.parameters())
    host = next((p for p in around if p.dtype.is_floating_point), None)
    if host is not None:
        part = part.to(device=host.device, dtype=host.dtype)
        if (
            host.dim() == 4
            and host.is_contiguous(memory_format=torch.channels_last)
            and not host.is_contiguous()
        ):
            part = part.to(memory_format=torch.channels_last)
    return part.train(block.training)


def _of_dim(attention: Callable[..., nn.Module], channels: int, dim: int) -> nn.Module:
    """The attention for a map of `dim` spatial dimensions, passed as `dim` if it has that parameter."""
    try:
        told = "dim" in inspect.signature(attention).parameters
    except ValueError:  # some callables have no signature
        told = False
    return attention(channels, dim=dim) if told else attention(channels)


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


def _check_part(part: nn.Module, name: str, value: Value, start: str) -> None:
    """Run the attention alone, to find a wrong shape or start before anything changes."""
    weight = next(part.parameters(), None)
    if weight is not None and weight.is_meta:
        return
    x = torch.linspace(-2, 2, 15 * value.channels)
    x = x.reshape(1, value.channels, *((15,), (5, 3), (5, 3, 1))[value.dims - 3])
    try:
        with torch.no_grad(), eval_mode(part):
            out = part(x if weight is None else x.to(weight))
    except Exception as error:
        raise AttachError(
            f"{type(part).__name__} refuses the {value.dims}-D map of {name}: {error}; nothing was changed"
        ) from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise AttachError(
            f"{type(part).__name__} turns {tuple(x.shape)} into {getattr(out, 'shape', type(out))}"
        )
    if start == "identity" and not torch.equal(out, x.to(out)):
        raise AttachError(f"{type(part).__name__}.identity_() does not make it compute exactly its input")


def _refuse_wrapped(model: nn.Module, verb: str = "attach") -> None:
    check_module(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"at {name!r}" if name else "as the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(f"found a scripted or traced module {where}: {verb} before torch.jit")
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise AttachError(f"found a compiled module {where}: {verb} first, then torch.compile")
        if _EXPORTED & {c.__name__ for c in type(module).__mro__}:
            raise AttachError(f"found an exported program {where}: {verb} first, then torch.export")
        if kind in _WRAPPERS or kind.startswith("FSDP"):
            raise AttachError(f"found {kind} {where}: {verb} before wrapping for distribution")
        if callable(getattr(type(module), "weight", None)):
            raise AttachError(f"found a quantised {kind} {where}: {verb}, then quantise")
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise AttachError(f"found an uninitialised {kind} {where}: run the model once, then {verb}")
