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
        kind: "what" (of the channels) or "where" (of the pixels), for a factor whose shape does not say it.
    """

    kind: str | None = None

    def gate(self, x: Tensor) -> Tensor:
        """The factor that `forward` multiplies `x` by."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return rescale(x, self.gate(x))

    def __prepare_scriptable__(self) -> NoReturn:
        raise ExportError(
            f"torch.jit.script reads source, and {type(self).__name__} is more than that: take "
            "torch.jit.trace with an example, or cbam.export"
        )

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does."""
        for layer in self.modules():
            if layer is not self and hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # pyright: ignore[reportCallIssue]


class SigmoidGate(Gate):
    """A gate made of sigmoids, with a gain g: 1 as in its paper, another for an identity start.

    Nearly all multiply by the gain. It is the reciprocal of the gate's value when its last layers are zero,
    so that the gate is then exactly 1: 2 for sigmoid(0) = 1/2. It is in the state dict unless it is 1.
    """

    gain: Tensor | None
    _read: tuple[Tensor, float, float] | None = None  # the gain's tensor, its version, and its value

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", None)  # None is 1, and leaves no key in the state dict

    def gain_value(self) -> float:
        """The gain as a number.

        It is read when it is loaded or moved, and on a GPU not again: reading it in every step would make the
        CPU wait. So change it with `set_gain`, not in place.
        """
        (gain,), read = parts(self, "gain"), self._read
        if gain is None:
            return 1.0
        if read is not None and read[0] is gain and torch.compiler.is_compiling():
            return read[2]
        if read is None or read[0] is not gain or (gain.device.type == "cpu" and read[1] != _version(gain)):
            self._read = read = (gain, _version(gain), gain.item())
        return read[2]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_anew()

    def _apply(self, *args, **kwargs) -> "SigmoidGate":
        super()._apply(*args, **kwargs)
        self._read_anew()
        return self

    def _read_anew(self) -> None:
        """Read the gain now, for a compiler cannot: it would break the graph at every gate."""
        self._read = None
        if type(self.gain) is Tensor and not self.gain.is_meta:
            self.gain_value()

    def set_gain(self, gain: float) -> None:
        """Set the gain, a positive number; 1 removes its key from the state dict."""
        if not 0 < gain < math.inf:
            raise InputError(f"a gain must be a positive number, got {gain}")
        like = next(self.parameters())
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained later
            self.gain = None if gain == 1 else torch.full((), gain, dtype=like.dtype, device=like.device)
        self._read = None if self.gain is None else (self.gain, _version(self.gain), float(gain))

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does; gain 1."""
        super().reset_parameters()
        self.set_gain(1)

    def _shown_gain(self) -> str:
        """The gain as `extra_repr` shows it; empty for 1."""
        return "" if self.gain is None or self.gain.is_meta else f", gain={self.gain_value():g}"

    def _open(self, logits: Tensor) -> Tensor:
        return self._amplify(torch.sigmoid(logits))

    def _amplify(self, gate: Tensor) -> Tensor:
        return gate if self.gain is None else self.gain * gate


def _version(t: Tensor) -> float:
    """The version counter of `t`; of an inference tensor, which has none, NaN, which equals nothing."""
    return math.nan if t.is_inference() else t._version


def zero_(*layers: nn.Module) -> None:
    """Set every weight and bias of these layers to zero, in place."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
