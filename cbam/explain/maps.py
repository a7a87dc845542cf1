"""Class activation maps by torchcam, and the share of a map inside a box.

Shapes: N samples of C channels, H x W pixels of the input, h x w pixels of the layer's map.
"""

import logging
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam.errors import ConfigError, InputError, MissingExtraError, NonFiniteError
from cbam.explain.layers import LayerSpec, default_layer, find_layer
from cbam.explain.watching import check_hookable, check_images, explain_dtype_errors, is_detection, logits_of
from cbam.surgery.effects import eval_mode

METHODS = {  # name -> display name
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "layercam": "LayerCAM",
    "scorecam": "Score-CAM",
}
SLOW = ("scorecam",)  # one forward pass per channel

_log = logging.getLogger("cbam")


def gradcam(
    model: nn.Module,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    layer: str | nn.Module | None = None,
    method: str = "gradcam",
) -> Tensor:
    """Map where in each image the evidence for a class lies: (N, C, H, W) -> (N, H, W) in [0, 1].

    Each map is scaled to its own minimum and maximum and resized bilinearly to the input. It is computed in
    eval mode, with its own gradient context: this works on a frozen model and inside `torch.no_grad()` or
    `torch.inference_mode()`, and leaves modes, hooks and every `.grad` unchanged. A constant map locates
    nothing, and is returned as zeros.

    Args:
        model: a classifier that returns class scores (N, K); or a detector with torchvision's interface, for
            which the score of a class is the sum over its boxes.
        images: normalised, float (N, C, H, W).
        target: a class for all images, one per image, or None for the predicted class.
        layer: a module or its name, whose output is a feature map, (N, C, h, w) or (N, h, w, C). By default
            the outermost module that finishes last with a map of more than one pixel, pooling excluded:
            `layer4` of a ResNet, so the last block's output after its add. For a detector, the last one in
            its `backbone.body`, `backbone.features` or `backbone`. To tell maps from other outputs with four
            dimensions, the model is run at two larger sizes; if it takes only one size, the shapes decide.
        method: "gradcam" (arXiv 1610.02391), "gradcam++" (1710.11063), "layercam" (IEEE TIP 2021) or
            "scorecam" (1910.01279: one forward pass per channel of the layer).

    Raises:
        InputError: images, target or layer are invalid; or no layer is given and the network continues with
            tokens after its last map, like a transformer.
        DtypeError: the model does not take images of this dtype.
        NonFiniteError: the model outputs NaN or infinity.
        ConfigError: an unknown method or layer; a compiled or scripted model.
        MissingExtraError: torchcam is not installed.
    """
    check_hookable(model)
    check_images(images, model)
    with torch.inference_mode(False), explain_dtype_errors(images, model):
        one = images[:1].detach().clone()
        spec = default_layer(model, one) if layer is None else find_layer(model, one, layer)
    return gradcam_at(model, images, target, spec, method)


def gradcam_at(model: nn.Module, images: Tensor, target, spec: LayerSpec, method: str) -> Tensor:
    """`gradcam` for a layer that is already resolved."""
    check_images(images, model)
    extractor_type = _extractor_type(method)
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        images = images.detach().clone()
        with _image_area(model) as frame:
            maps = _raw_maps(model, images, target, spec, extractor_type)
    return _resize_to_images(images.shape[-2:], maps, frame)


def energy_inside(maps: Tensor, boxes: Tensor) -> Tensor:
    """The share of each map's energy inside its box: (N, H, W), (N, 4) -> (N,) float64 in [0, 1].

    Energy is the sum of the non-negative values. Boxes are x0, y0, x1, y1 in pixels, where pixel (i, j)
    covers [j, j+1] x [i, i+1]; a partly covered pixel counts by its covered area. NaN if the map has no
    energy or the box is NaN.

    Raises:
        InputError: the shapes do not match, or a box ends before it starts.
        NonFiniteError: a map is not finite.
    """
    if maps.dim() != 3 or boxes.shape != (len(maps), 4):
        raise InputError(
            f"expected maps (N, H, W) and boxes (N, 4), got {tuple(maps.shape)} and {tuple(boxes.shape)}"
        )
    if not maps.isfinite().all():
        raise NonFiniteError("energy_inside: a map contains NaN or infinity")
    boxes = boxes.to(maps.device, torch.float64)
    x0, y0, x1, y1 = boxes.unbind(1)
    if ((x1 < x0) | (y1 < y0)).any():
        raise InputError("energy_inside: a box ends before it starts; boxes are x0, y0, x1, y1")
    energy = maps.to(torch.float64).clamp(min=0)
    inside = torch.einsum(
        "nhw,nh,nw->n", energy, _cover(y0, y1, maps.shape[1]), _cover(x0, x1, maps.shape[2])
    )
    return inside / energy.sum((1, 2))  # 0 / 0 = NaN for a map without energy


def _cover(start: Tensor, end: Tensor, size: int) -> Tensor:
    """How much of each of `size` unit cells lies in [start, end]: (N,), (N,) -> (N, size)."""
    cell = torch.arange(size, device=start.device, dtype=start.dtype)
    return (torch.minimum(end[:, None], cell + 1) - torch.maximum(start[:, None], cell)).clamp(min=0)


def _raw_maps(model, images: Tensor, target, spec: LayerSpec, extractor_type) -> Tensor:
    """Unscaled maps (N, h, w) of the layer at `place`."""
    name = spec.name
    layer = model.get_submodule(name)
    with ExitStack() as undo:
        undo.callback(layer.register_forward_hook(_start_graph(spec), prepend=True).remove)
        extractor = undo.enter_context(extractor_type(model, name))
        undo.callback(layer.register_forward_hook(_pass_copy(spec)).remove)
        output = model(images)
        if is_detection(output) and not _supports_detectors(extractor):
            raise ConfigError(
                "scorecam needs the scores of a classifier; choose another method for a detector"
            )
        scores = logits_of(output)
        if is_detection(output) and not any(len(one["scores"]) for one in output):
            raise InputError("the detector finds nothing in these images, so there is no evidence to show")
        if extractor.hook_a[0] is None:
            raise InputError(f"layer {name!r} is not used in the forward pass; choose another layer")
        classes = _classes(target, scores)
        try:
            (maps,) = extractor(classes, scores, normalized=False)
        except RuntimeError as error:
            if "not connected" not in str(error):
                raise
            raise InputError(
                f"the class score does not depend on layer {name!r}; choose another layer"
            ) from error
        # torchcam's sum ignores NaN, so its operands are checked too.
        _refuse_nonfinite(scores, *extractor.hook_a, *(g for g in extractor.hook_g if g is not None), maps)
    if len(maps) != len(images):
        raise InputError(
            f"layer {name!r} returns {len(maps)} maps for {len(images)} images; choose another layer"
        )
    return maps.detach()


def _supports_detectors(extractor) -> bool:
    from torchcam.methods import ScoreCAM

    return not isinstance(extractor, ScoreCAM)


def _start_graph(spec: LayerSpec):
    """A forward hook that starts the autograd graph at the layer's output, (N, C, h, w): no layer before it
    needs a gradient."""

    def start(_, args, output: object) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() != 4:
            got = (
                f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            )
            raise InputError(f"layer {spec.name!r} must return a feature map (N, C, h, w), got {got}")
        with torch.inference_mode(False):
            output = output.detach().clone()
            return (output.permute(0, 3, 1, 2) if spec.channels_last else output).requires_grad_()

    return start


def _pass_copy(spec: LayerSpec):
    """A forward hook that passes on a copy, since later layers may modify it in place.

    The copy is part of the graph even if the model runs this layer under `no_grad`.
    """

    def copy(_, args, output: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return (output.permute(0, 2, 3, 1) if spec.channels_last else output).clone()

    return copy


@contextmanager
def _image_area(model: nn.Module) -> Iterator[list[float]]:
    """The shares of the network input's height and width that the images cover.

    torchvision's detectors pad images at the bottom and right, to a multiple of 32 pixels.
    """
    share = [1.0, 1.0]

    def note(_, args, output) -> None:
        inner, whole = output[0].image_sizes[0], output[0].tensors.shape[-2:]
        share[:] = [a / b for a, b in zip(inner, whole, strict=True)]

    with ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__ == "GeneralizedRCNNTransform":
                undo.callback(module.register_forward_hook(note).remove)
        yield share


def _resize_to_images(size: Sequence[int], maps: Tensor, frame: Sequence[float]) -> Tensor:
    """Resize maps (N, h, w) to the images, (N, H, W) in [0, 1], without the cells that cover padding."""
    cells = [side * share for side, share in zip(maps.shape[1:], frame, strict=True)]
    rows, columns = (math.ceil(n - 1e-6) for n in cells)
    maps = _rescale(maps[:, :rows, :columns])
    reach = [round(S * k / n) for S, k, n in zip(size, maps.shape[1:], cells, strict=True)]
    over = F.interpolate(maps[:, None], reach, mode="bilinear")[:, 0, : size[0], : size[1]]
    return over.clamp(0, 1)


def _rescale(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1], (N, h, w) -> float (N, h, w); zeros if it is constant up to rounding."""
    rounding = 8 * torch.finfo(maps.dtype).eps
    maps = maps if maps.dtype == torch.float64 else maps.float()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= rounding * high.abs()
    if flat.any():
        _log.info("gradcam: %d of %d maps are constant and returned as zeros", int(flat.sum()), len(maps))
    return ((maps - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)


def _classes(target, scores: Tensor) -> list[int]:
    """Validate the target: one class index per sample."""
    N, K = scores.shape
    if target is None:
        return scores.argmax(1).tolist()
    try:
        classes = [_index(target)] * N
    except TypeError:  # not one number
        try:
            classes = [_index(one) for one in target]
        except TypeError:
            classes = []
    if len(classes) != N or any(not 0 <= c < K for c in classes):
        raise InputError(f"target must be one class in 0..{K - 1} or {N} of them, got {target!r}")
    return classes


def _index(number) -> int:
    """Convert an integer of any library to int; a bool is refused."""
    if isinstance(number, bool) or getattr(number, "dtype", None) in (torch.bool, "bool"):
        raise TypeError
    return operator.index(number)


def _refuse_nonfinite(*tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NonFiniteError(
            "gradcam: the model outputs NaN or infinity on these images; check its weights and input"
        )


def _extractor_type(method: str):
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    try:
        from torchcam import methods
    except ImportError as error:
        raise MissingExtraError.of(method, "explain") from error

    class GradCAMpp(methods.GradCAM):
        """Grad-CAM++, equation 19; torchcam 0.5 divides a copy, so its weights lack the denominator."""

        def _get_weights(self, class_idx, scores: Tensor, **kwargs) -> list[Tensor]:
            self._backprop(scores, class_idx, **kwargs)
            pairs = zip(self.hook_a, self.hook_g, strict=True)
            return [_plus_plus(a, g) for a, g in pairs if a is not None and g is not None]

    return dict(zip(METHODS, (methods.GradCAM, GradCAMpp, methods.LayerCAM, methods.ScoreCAM), strict=True))[
        method
    ]


def _plus_plus(activation: Tensor, gradient: Tensor) -> Tensor:
    """Channel weights of Grad-CAM++: (N, C, h, w) twice -> (N, C).

    alpha = g^2 / (2 g^2 + g^3 sum A) is computed as 1 / (2 + g sum A) for g > 0, which does not underflow.
    """
    gradient = gradient.clamp(min=0)
    denominator = 2 + gradient * activation.sum((2, 3), keepdim=True)
    return (gradient / denominator.masked_fill(denominator == 0, torch.inf)).sum((2, 3))
