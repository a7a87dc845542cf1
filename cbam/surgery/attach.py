"""Attach attention to a model in place, detach it, or bypass it."""

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
from cbam.surgery.sites import Site, check_module, label, output_sites, sites
from cbam.surgery.trial import Value

_log = logging.getLogger("cbam")
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
# The classes that `program.module()` and torch.export.unflatten return.
_EXPORTED = {"_StatefulGraphModule", "UnflattenedModule"}


def attach(
    model: nn.Module,
    where: str | Callable[[str, nn.Module], bool] | None = None,
    attention: str | Callable[[int], nn.Module] = CBAM,
    *,
    start: str = "identity",
) -> nn.Module:
    """Attach attention to `model`, in place, before the add of every residual block; returns `model`.

    No key of the model changes and no weight is touched: the attention becomes a child of its block, named
    `cbam`. With `start="identity"` the outputs stay bit-identical
    (where fused kernels run, see docs/kernels.md: in float32 and float64 on a CPU, elsewhere up to rounding).

    Args:
        model: not yet compiled, scripted or wrapped for distribution.
        where: a regular expression that must match a whole module name, or `(name, module) -> bool`. It
            selects among the residual blocks that `sites(model)` lists; if it matches none of them, the
            modules it matches get attention on their output.
        attention: `channels -> module`, where the module keeps the shape of its input, or the name of an
            included module, such as "eca". A parameter `dim` gets the number of spatial dimensions if it is
            not two.
        start: "identity", which requires the attention to have `identity_()`; or "paper", its own
            initialisation, the default of `cbam.build`.

    Raises:
        AttachError: nothing matches, or attention is already attached or cannot be; nothing is changed.
        InputError: an unknown `start` or attention name, or an invalid `where`.
    """
    factory = _attention_factory(attention)
    if start not in ("identity", "paper"):
        raise InputError(f'start must be "identity" or "paper", got {start!r}')
    _refuse_wrapped(model)
    chosen = _choose(model, where)
    modules = dict(model.named_modules())
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        # tensors made in inference mode could not be trained later
        parts = [(modules[s.name], s, _build(modules[s.name], model, s, factory, start)) for s in chosen]
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
    _log.info("attention attached at %d places: %s", len(chosen), ", ".join(label(s.name) for s in chosen))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove all attention from `model`, in place: outputs, keys, hooks and classes are as before `attach`.

    Raises:
        AttachError: the model has no attention, or is wrapped.
    """
    for block in _attached_blocks(model, "detach"):
        restore(block)
    return model


@contextlib.contextmanager
def bypassed(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager: `model` computes, bit for bit, what it would after `detach`.

    Its weights and keys do not change, including those of the attention.

    Raises:
        AttachError: the model has no attention, or is wrapped.
    """
    with contextlib.ExitStack() as stack:
        for block in _attached_blocks(model, "bypass"):
            stack.enter_context(paused(block))
        yield model


def _attached_blocks(model: nn.Module, verb: str) -> list[nn.Module]:
    """The blocks with attention, after checking that it can be removed from all of them."""
    _refuse_wrapped(model, verb)
    blocks = {name: m for name, m in model.named_modules() if is_refined(m)}
    if not blocks:
        raise AttachError(
            f"nothing to {verb}: the model has no attached attention, or it is already bypassed"
        )
    for name, block in blocks.items():
        if not is_last_refined(block):
            raise AttachError(
                f"cannot {verb}: the class of {label(name)} was changed after attaching, to "
                f"{type(block).__name__}; undo that first (fully_shard, a parametrisation, ...)"
            )
    return list(blocks.values())


def _choose(model: nn.Module, where: str | Callable[[str, nn.Module], bool] | None) -> list[Site]:
    found = sites(model)
    if where is None:
        for site in found:
            if site.name_taken:
                raise AttachError(f"{label(site.name)} {site.why}; nothing was changed")
        chosen = [s for s in found if s.default]
        if not chosen:
            reasons = (
                "; ".join(f"{label(s.name)}: {s.why}" for s in found[:3])
                or "it has no residual block with a convolution"
            )
            raise NoPlaceError(
                f"no place for attention in {type(model).__name__} ({reasons}); pass where=..."
            )
    else:
        matches = _matcher(where)
        names = [name for name, module in model.named_modules() if matches(name, module)]
        chosen = _chosen_by(names, found, model, where)
    if already := [label(s.name) for s in chosen if s.attached]:
        raise AttachError(
            f"attention is already attached at {', '.join(already[:4])}"
            f"{' and elsewhere' if len(already) > 4 else ''}; call cbam.detach(model) first"
        )
    return chosen


def _chosen_by(names: list[str], found: list[Site], model: nn.Module, where) -> list[Site]:
    usable = [s for s in found if s.name in names and s.route]
    if usable:
        return usable
    impossible = [s for s in found if s.name in names and s.why != "no skip connection"]
    if impossible:
        raise AttachError(
            f"attention cannot go into {label(impossible[0].name)}: {impossible[0].why}; nothing was changed"
        )
    if not names:
        known = [name for name, _ in model.named_modules() if name]
        nearest = (
            difflib.get_close_matches(str(where), known, 3, cutoff=0.0)
            if isinstance(where, str)
            else known[:3]
        )
        suggestion = (
            f"; did you mean attention={where!r}?" if isinstance(where, str) and where in ATTENTION else ""
        )
        raise AttachError(
            f"where={where!r} matches no whole module name; nearest: {', '.join(nearest)}; "
            f"see cbam.sites(model){suggestion}"
        )
    return output_sites(model, names)


def _matcher(where: str | Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    if isinstance(where, nn.Module) or (isinstance(where, type) and issubclass(where, nn.Module)):
        raise InputError("the second argument is where, got a module; pass it as attention=...")
    if callable(where):
        return where
    if not isinstance(where.pattern if isinstance(where, re.Pattern) else where, str):
        raise InputError(
            f"where must be a regular expression or (name, module) -> bool, got {where!r:.80}; "
            'join several names into one expression, "layer1|layer2"'
        )
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise InputError(f"where={where!r} is not a valid regular expression: {error}") from None
    return lambda name, module: pattern.fullmatch(name) is not None


def _attention_factory(attention: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    if isinstance(attention, str):
        if attention in ATTENTION:
            return ATTENTION[attention]
        nearest = ", ".join(difflib.get_close_matches(attention.lower(), ATTENTION, 3, 0.3) or ATTENTION)
        raise InputError(f"unknown attention {attention!r}; nearest: {nearest}")
    if isinstance(attention, nn.Module) or not callable(attention):
        raise InputError(
            f"attention must be a name or a function from channels to a module, such as cbam.CBAM; "
            f"got a {type(attention).__name__}"
        )
    return attention


def _build(
    block: nn.Module, model: nn.Module, site: Site, attention: Callable[[int], nn.Module], start: str
) -> nn.Module:
    """Create, initialise and check the attention of one site, on the device and in the dtype of its block."""
    channels = site.channels
    assert channels is not None
    try:
        part = (
            attention(channels) if site.dims == 4 else _attention_of_dim(attention, channels, site.dims - 2)
        )
    except Exception as error:
        raise AttachError(
            f"attention({channels}) for {label(site.name)} failed: {error}; nothing was changed"
        ) from error
    if not isinstance(part, nn.Module):
        raise AttachError(f"attention({channels}) returned a {type(part).__name__}, expected an nn.Module")
    if start == "identity":
        _start_at_identity(part)
    _check_part(part, label(site.name), Value(channels, site.dims), start)
    parameters = (p for m in (block, model) for p in m.parameters())
    host = next((p for p in parameters if p.dtype.is_floating_point), None)
    if host is not None:
        part = part.to(device=host.device, dtype=host.dtype)
        if (
            host.dim() == 4
            and host.is_contiguous(memory_format=torch.channels_last)
            and not host.is_contiguous()
        ):
            part = part.to(memory_format=torch.channels_last)
    return part.train(block.training)


def _attention_of_dim(attention: Callable[..., nn.Module], channels: int, dim: int) -> nn.Module:
    """Create attention for a map with `dim` spatial dimensions, passing `dim` if it has that parameter."""
    try:
        takes_dim = "dim" in inspect.signature(attention).parameters
    except ValueError:  # some callables have no signature
        takes_dim = False
    return attention(channels, dim=dim) if takes_dim else attention(channels)


def _start_at_identity(part: nn.Module) -> None:
    identity = getattr(part, "identity_", None)
    if callable(identity):
        identity()
    elif isinstance(part, nn.Sequential):
        for step in part:
            _start_at_identity(step)
    else:
        raise AttachError(
            f'start="identity" needs {type(part).__name__}.identity_(), which makes it return its input; '
            'define it, or pass start="paper"'
        )


def _check_part(part: nn.Module, name: str, value: Value, start: str) -> None:
    """Run the attention on its own, to find a wrong shape or start before anything changes."""
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
            f"{type(part).__name__} does not accept the {value.dims}-D map of {name}: {error}; "
            "nothing was changed"
        ) from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise AttachError(
            f"{type(part).__name__} must keep the shape of its input: for {tuple(x.shape)} it returned "
            f"{getattr(out, 'shape', type(out))}"
        )
    if start == "identity" and not torch.equal(out, x.to(out)):
        raise AttachError(f"{type(part).__name__}.identity_() does not make it return exactly its input")


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
