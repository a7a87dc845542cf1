"""Gates: attention that multiplies a feature map by a factor computed from it."""

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from cbam.errors import ExportError, InputError
from cbam.nn.tail import parts
from cbam.ops import rescale

torch.fx.wrap("rescale")


class Gate(nn.Module):
    """`x` times a factor of shape (N, C, 1, 1), (N, 1, H, W) or (N, C, H, W), computed from `x`.

    Attributes:
        kind: "what" (per channel) or "where" (per pixel), if the shape of the factor does not show it.
    """

    kind: str | None = None

    def gate(self, x: Tensor) -> Tensor:
        """The factor that `forward` multiplies `x` by."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return rescale(x, self.gate(x))

    def __prepare_scriptable__(self) -> NoReturn:
        raise ExportError(
            f"torch.jit.script cannot compile {type(self).__name__} from its source: use "
            "torch.jit.trace with an example input, or cbam.export"
        )

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does."""
        for layer in self.modules():
            if layer is not self and hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # pyright: ignore[reportCallIssue]


class SigmoidGate(Gate):
    """A gate made of sigmoids, with a gain g: 1 as in its paper, another for an identity start.

    Most multiply by the gain. For an identity start it is the reciprocal of the gate's value with zero last
    layers, 2 for sigmoid(0) = 1/2, so that the gate is exactly 1. The state dict has it unless it is 1.
    """

    gain: Tensor | None
    _cached_gain: tuple[Tensor, float, float] | None = None  # the gain's tensor, its version, and its value

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", None)  # None is 1, and leaves no key in the state dict

    def gain_value(self) -> float:
        """The gain as a number.

        It is read when it is loaded or moved, and on a GPU only then: reading it in every step would make the
        CPU wait for the GPU. So change it with `set_gain`, not in place.
        """
        (gain,), cached = parts(self, "gain"), self._cached_gain
        if gain is None:
            return 1.0
        if cached is not None and cached[0] is gain and torch.compiler.is_compiling():
            return cached[2]
        if (
            cached is None
            or cached[0] is not gain
            or (gain.device.type == "cpu" and cached[1] != _version(gain))
        ):
            self._cached_gain = cached = (gain, _version(gain), gain.item())
        return cached[2]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh_gain()

    def _apply(self, *args, **kwargs) -> "SigmoidGate":
        super()._apply(*args, **kwargs)
        self._refresh_gain()
        return self

    def _refresh_gain(self) -> None:
        """Read the gain now: a compiler that had to read it would break the graph at every gate."""
        self._cached_gain = None
        if type(self.gain) is Tensor and not self.gain.is_meta:
            self.gain_value()

    def set_gain(self, gain: float) -> None:
        """Set the gain, a positive number; 1 removes its key from the state dict."""
        if not 0 < gain < math.inf:
            raise InputError(f"a gain must be a positive number, got {gain}")
        like = next(self.parameters())
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be used in training
            self.gain = None if gain == 1 else torch.full((), gain, dtype=like.dtype, device=like.device)
        self._cached_gain = None if self.gain is None else (self.gain, _version(self.gain), float(gain))

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does; gain 1."""
        super().reset_parameters()
        self.set_gain(1)

    def _gain_repr(self) -> str:
        """The gain as `extra_repr` shows it; empty for 1."""
        return "" if self.gain is None or self.gain.is_meta else f", gain={self.gain_value():g}"

    def _open(self, logits: Tensor) -> Tensor:
        return self._apply_gain(torch.sigmoid(logits))

    def _apply_gain(self, gate: Tensor) -> Tensor:
        return gate if self.gain is None else self.gain * gate


def _version(t: Tensor) -> float:
    """The version counter of `t`; NaN, which equals nothing, for an inference tensor, which has none."""
    return math.nan if t.is_inference() else t._version


def zero_(*layers: nn.Module) -> None:
    """Set every weight and bias of these layers to zero, in place."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
