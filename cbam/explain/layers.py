"""The layer whose feature map is shown, and which of its dimensions holds the channels.

Shapes: N samples of C channels, H x W pixels of the input, h x w pixels of the layer's map, T tokens.
"""

import difflib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError
from cbam.explain.watching import is_detection
from cbam.surgery.effects import eval_mode

_BACKBONES = ("backbone.body.", "backbone.features.", "backbone.")  # of torchvision's detectors

# Pooling changes the size of a map but adds no information, so these layers are not chosen.
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)

_MIN_LENGTH = 128  # pixels, four times the total stride of most networks

_Shapes = dict[str, tuple[int, ...]]  # module name -> output shape, in the order the modules finish


@dataclass(frozen=True)
class LayerSpec:
    """A layer that returns a feature map: (N, C, h, w), or (N, h, w, C) if `channels_last`."""

    name: str
    channels_last: bool = False


def default_layer(model: nn.Module, images: Tensor) -> LayerSpec:
    """The default layer of `gradcam`; runs the model three times, on the images and on two larger sizes.

    Raises:
        InputError: no module returns a feature map of more than one pixel; or the network continues with
            tokens after the last one, like a transformer.
    """
    seen = _OutputShapes(model, images)
    pools = {name for name, module in model.named_modules() if isinstance(module, _POOLS)}
    names = [name for name, shape in seen.shapes.items() if len(shape) == 4 and name not in pools]
    if seen.detects and not (names := _in_backbone(names)):
        raise InputError("the detector has no `backbone` that returns a feature map; name a layer that does")
    for name in reversed(names):
        channels_last = seen.channels_last(name)
        pixels = seen.shapes[name][1:3] if channels_last else seen.shapes[name][2:]
        if channels_last is None or torch.Size(pixels).numel() == 1:
            continue
        if not seen.detects and (tokens := seen.tokens_after(name)):
            raise InputError(
                f"the model continues with tokens after its last feature map: {tokens!r} returns "
                f"{seen.shapes[tokens]}, which is no map; name a layer that returns one, such as {name!r}"
            )
        return LayerSpec(name, channels_last)
    reason = next((f"; {n!r} returns {seen.shapes[n]}, which is none" for n in reversed(names)), "")
    raise InputError(
        f"no layer of the model returns a feature map of more than one pixel; larger images may help{reason}"
    )


def find_layer(model: nn.Module, images: Tensor, layer: str | nn.Module) -> LayerSpec:
    """The layer that the user chose; its output is examined as in `default_layer`.

    Raises:
        ConfigError: the model has no such layer.
        InputError: its output has four dimensions but is not a feature map: heads, tokens, windows.
    """
    name = _name_of(model, layer)
    seen = _OutputShapes(model, images)
    if len(seen.shapes.get(name, ())) != 4:
        return LayerSpec(name)  # refused later, when the layer runs
    channels_last = seen.channels_last(name)
    if channels_last is None:
        raise InputError(
            f"layer {name!r} must return a feature map (N, C, h, w) or (N, h, w, C), got shape "
            f"{seen.shapes[name]}, which does not grow with the image as a map does; choose another layer"
        )
    return LayerSpec(name, channels_last)


class _OutputShapes:
    """The output shapes of all modules for the images, for wider images and for taller images."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.size = tuple(images.shape[-2:])
        with torch.no_grad(), eval_mode(model):
            self.shapes, output = _output_shapes(model, images)
            self.detects = is_detection(output)
            self._larger: list[_Shapes] = []
            if not self.detects:
                try:
                    self._larger = [_output_shapes(model, _repeated(images, d))[0] for d in (3, 2)]
                except Exception:  # a network with a fixed input size may raise anything
                    self._larger = []

    def channels_last(self, name: str) -> bool | None:
        """Whether the last dimension of a map holds its channels; None if the output is not a map."""
        own = self.shapes[name]
        if self.detects:
            return False  # pyramids and heads only take (N, C, h, w)
        by_stride = _layout_from_shape(own, lambda h, w: _strided(h, w, *self.size))
        if not self._larger:
            return by_stride
        others = [shapes.get(name, ()) for shapes in self._larger]
        if own == others[0] == others[1]:  # the model resizes its images, or this map, to a fixed size
            squares = _layout_from_shape(own, int.__eq__)
            return by_stride if squares is None else squares
        grown = [[d for d, (a, b) in enumerate(zip(own, other, strict=False)) if a != b] for other in others]
        # The dimensions that grow with the width, and with the height.
        known = {False: [[3], [2]], True: [[2], [1]]}
        return next((last for last, dims in known.items() if dims == grown), None)

    def tokens_after(self, name: str) -> str | None:
        """A module after `name` that returns tokens, (N, T, C), and is not inside one that returns a map."""
        later = list(self.shapes)[list(self.shapes).index(name) + 1 :]
        for one in reversed(later):
            shape = self.shapes[one]
            parents = [a for a in _parents(one) if a in later and not name.startswith(f"{a}.")]
            if len(shape) == 3 and shape[1] > 1 and all(len(self.shapes[a]) == 3 for a in parents):
                return one
        return None


def _repeated(images: Tensor, dim: int) -> Tensor:
    """The images repeated along `dim`, at least twice, and often enough that the deepest map grows too."""
    return torch.cat([images] * max(2, -(-_MIN_LENGTH // images.shape[dim])), dim)


def _output_shapes(model: nn.Module, images: Tensor) -> tuple[_Shapes, object]:
    """The shape of each module's last output, and the output of the model."""
    shapes: _Shapes = {}

    def note(name: str, output: object) -> None:
        shapes.pop(name, None)  # if a module runs again, its last run determines the order
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(lambda m, _, out, name=name: note(name, out))
                undo.callback(hook.remove)
        return shapes, model(images)


def _in_backbone(names: list[str]) -> list[str]:
    """The layers inside the backbone of a detector, or the backbone itself if it is a single layer."""
    inside = ([name for name in names if name.startswith(part)] for part in _BACKBONES)
    return next(filter(None, inside), [name for name in names if name == "backbone"])


def _layout_from_shape(shape: tuple[int, ...], fits) -> bool | None:
    """`channels_last` of a map, from its shape alone; None if neither or both layouts fit."""
    last, first = (bool(fits(h, w)) for h, w in pairwise(shape[1:]))
    return None if last == first else last


def _strided(h: int, w: int, H: int, W: int) -> bool:
    """Whether h x w is H x W divided by one integer stride, rounded down or up."""
    stride = max(1, round(H / h))
    return all(n in (N // stride, -(-N // stride)) for n, N in ((h, H), (w, W)))


def _parents(name: str) -> Iterator[str]:
    """The names of the modules that contain one: for "a.b.c", "a.b" and "a"."""
    while name := name.rpartition(".")[0]:
        yield name


def _name_of(model: nn.Module, layer: str | nn.Module) -> str:
    names = {name: module for name, module in model.named_modules() if name}
    for name, module in names.items():
        if layer is module or layer == name:
            return name
    near = difflib.get_close_matches(str(layer), names) if isinstance(layer, str) else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"the model has no layer {layer if isinstance(layer, str) else type(layer).__name__!r}{hint}"
    )
