"""What every attended block did to its feature map, step by step.

Shapes: N samples, C channels, H x W pixels of the block's feature map.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from cbam.explain.watching import refuse_unwatchable
from cbam.nn import CBAM, ChannelAttention, SpatialAttention
from cbam.surgery import attached


@dataclass(frozen=True, eq=False)
class Refinement:
    """One block's feature map before, between and after its gates; detached copies of what the forward used.

    A gate that the attention does not have is None, and the map after it is the map before it.
    """

    before: Tensor  # (N, C, H, W)
    channel_gate: Tensor | None  # (N, C, 1, 1), what
    after_what: Tensor  # (N, C, H, W)
    spatial_gate: Tensor | None  # (N, 1, H, W), where
    after_where: Tensor  # (N, C, H, W)
    gain: float = 1.0  # a gate lies in (0, gain); at gain / 2 its sigmoid is in the middle


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Refinement]]:
    """Record what attention does in the forward passes run inside the block.

        with cbam.explain.record(model) as recording:
            model(images)
        recording["layer4.1"].spatial_gate      # (N, 1, H, W)

    The dict is filled by block name, in the order the blocks run; a later pass replaces an earlier one.
    Attention of ours (`CBAM`, `ChannelAttention`, `SpatialAttention`) is found wherever it sits, attached or
    written by hand, and named by the module that holds it. Values are those the forward computed, in train
    mode too: nothing is computed twice. The model is left as it was, also when the body raises; recordings
    may be nested.

    Raises:
        ConfigError: the model is compiled or scripted.
    """
    refuse_unwatchable(model)
    recording: dict[str, Refinement] = {}
    with ExitStack() as undo:
        for name, attention in _blocks(model).items():
            _watch(name, attention, recording, undo)
        yield recording


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Block name -> its attention: what is attached there, else an outermost module of ours."""
    ours = (CBAM, ChannelAttention, SpatialAttention)
    units = [part for part in attached(model).values() if any(isinstance(m, ours) for m in part.modules())]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and (isinstance(module, ours) or any(module is unit for unit in units)):
            found[name] = module
    parents = [name.rpartition(".")[0] for name in found]
    alone = {parent for parent in parents if parent and parents.count(parent) == 1}
    return {
        parent if parent in alone else name: found[name] for parent, name in zip(parents, found, strict=True)
    }


def _watch(name: str, attention: nn.Module, recording: dict[str, Refinement], undo: ExitStack) -> None:
    """Write a `Refinement` under `name` each time `attention` has run; `undo` takes all of it back."""
    channel = next((m for m in attention.modules() if isinstance(m, ChannelAttention)), None)
    spatial = next((m for m in attention.modules() if isinstance(m, SpatialAttention)), None)
    last = spatial or channel
    seen: dict[str, Tensor] = {}
    if channel is not None:
        _keep_gate(channel, "what", seen, undo)
        undo.callback(
            channel.register_forward_hook(lambda _, args, out: seen.update(after_what=_copy(out))).remove
        )
    if spatial is not None:
        _keep_gate(spatial, "where", seen, undo)

    def keep(_, args: tuple[Tensor, ...], out: Tensor) -> None:
        before = _copy(args[0])
        recording[name] = Refinement(
            before=before,
            channel_gate=seen.get("what"),
            after_what=seen.get("after_what", before),
            spatial_gate=seen.get("where"),
            after_where=_copy(out),
            gain=1.0 if last is None or last.gain is None else float(last.gain),
        )
        seen.clear()

    undo.callback(attention.register_forward_hook(keep).remove)


def _keep_gate(
    module: ChannelAttention | SpatialAttention, key: str, seen: dict[str, Tensor], undo: ExitStack
) -> None:
    """Copy what `module.gate` returns into `seen`; an instance attribute shadows the method until `undo`."""
    shadow = vars(module).get("gate")  # of an outer recording
    gate = module.gate

    def kept(x: Tensor) -> Tensor:
        value = gate(x)
        seen[key] = _copy(value)
        return value

    def restore() -> None:
        del vars(module)["gate"]
        if shadow is not None:
            vars(module)["gate"] = shadow

    undo.callback(restore)
    vars(module)["gate"] = kept


def _copy(x: Tensor) -> Tensor:
    """A copy out of the graph: the block may go on to add into the same memory."""
    return x.detach().clone()
