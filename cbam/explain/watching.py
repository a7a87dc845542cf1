"""Checks and helpers for observing a model: images, class scores, and models without usable hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from cbam.errors import CBAMError, ConfigError, DtypeError, InputError


def check_hookable(model: nn.Module) -> None:
    """Raise if a model bypasses hooks, so that a recording would silently stay empty.

    Raises:
        ConfigError: the model is compiled or scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("the model is scripted, which hides its layers; pass the original model")
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise ConfigError(
            "the model is compiled, which ignores hooks; pass the model from before torch.compile"
        )


def logits_of(output: object) -> Tensor:
    """The class scores (N, K) in a model's output: the tensor itself, its `logits`, or those of its boxes.

    If a detector returns a dict of `boxes`, `labels` and `scores` per image, as torchvision's do, the score
    of a class is the sum over its boxes; K is the largest label found, plus one.

    Raises:
        InputError: the output has no (N, K) tensor.
    """
    if is_detection(output):
        return _scores_of_boxes(output)
    scores = getattr(output, "logits", output)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(output).__name__}"
        raise InputError(f"expected a classifier's scores (N, classes), but the model returned {got}")
    return scores


def is_detection(output: object) -> TypeGuard[list[dict[str, Tensor]]]:
    """Whether this is a detector's output: a dict of boxes, labels and scores per image."""
    named = {"boxes", "labels", "scores"}
    return (
        isinstance(output, list)
        and bool(output)
        and all(isinstance(d, dict) and named <= d.keys() for d in output)
    )


def _scores_of_boxes(found: list[dict[str, Tensor]]) -> Tensor:
    classes = 1 + max((int(one["labels"].max()) for one in found if len(one["labels"])), default=0)
    rows = []
    for one in found:
        empty = one["scores"].new_zeros(classes)
        rows.append(empty.index_add(0, one["labels"].long(), one["scores"]))
    return torch.stack(rows)


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raise unless `images` is a float batch (N, C, H, W) on the device of the model's weights."""
    if images.dim() != 4 or not images.is_floating_point() or 0 in images.shape:
        raise InputError(
            f"images must be a normalised float batch (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    weight = next(model.parameters(), images)
    if weight.device != images.device:
        raise InputError(f"images are on {images.device}, the model on {weight.device}; move one of them")


@contextmanager
def explain_dtype_errors(images: Tensor, model: nn.Module) -> Iterator[None]:
    """Turn a RuntimeError inside the block into a DtypeError if images and weights have different dtypes.

    The dtypes are not checked in advance, since a model may accept different ones, as under autocast.

    Raises:
        DtypeError: the dtypes differ, and the model raised.
    """
    try:
        yield
    except RuntimeError as error:
        weight = next(model.parameters(), images)
        if isinstance(error, CBAMError) or weight.dtype == images.dtype:
            raise
        raise DtypeError(
            f"images are {images.dtype}, the model's weights {weight.dtype}: call model.float(), or convert "
            "the images"
        ) from error
