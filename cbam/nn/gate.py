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

    Nearly all multiply by the gain: it is the reciprocal of what the gate is where its last layers are zero,
    and makes it exactly 1 there; 2 for sigmoid(0) = 1/2. It is kept in the state dict where it is not 1.
    """

    gain: Tensor | None
    _read: tuple[Tensor, float, float] | None = None  # the gain's tensor, its version, and its value

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", None)  # None is 1, and leaves no key in the state dict

    def gain_value(self) -> float:
        """The gain as a number.

        It is read from a GPU once for every tensor that `gain` becomes, and again after `load_state_dict`: to
        look at it in each step would make the CPU wait. Change it by `set_gain`, not in place.
        """
        (gain,), read = parts(self, "gain"), self._read
        if gain is None:
            return 1.0
        if read is not None and torch.compiler.is_compiling():
            return read[2]
        if read is None or read[0] is not gain or (gain.device.type == "cpu" and read[1] != _version(gain)):
            self._read = read = (gain, _version(gain), gain.item())
        return read[2]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read = None

    def set_gain(self, gain: float) -> None:
        """Make `gain`, a positive number, the gain of this gate; 1 takes its key out of the state dict."""
        if not 0 < gain < math.inf:
            raise InputError(f"a gain must be a positive number, got {gain}")
        like = next(self.parameters())
        with torch.inference_mode(False):  # weights may be loaded there, and trained later
            self.gain = None if gain == 1 else torch.full((), gain, dtype=like.dtype, device=like.device)
        self._read = None if self.gain is None else (self.gain, _version(self.gain), float(gain))

    def reset_parameters(self) -> None:
        """Initialise every layer as torch does; gain 1."""
        super().reset_parameters()
        self.set_gain(1)

    def _shown_gain(self) -> str:
        """What `extra_repr` says of the gain; nothing of 1."""
        return "" if self.gain is None or self.gain.is_meta else f", gain={self.gain_value():g}"

    def _open(self, logits: Tensor) -> Tensor:
        return self._amplify(torch.sigmoid(logits))

    def _amplify(self, gate: Tensor) -> Tensor:
        return gate if self.gain is None else self.gain * gate


def _version(t: Tensor) -> float:
    """How often `t` was written to. An inference tensor has no count and never equals an earlier one."""
    return math.nan if t.is_inference() else t._version


def zero_(*layers: nn.Module) -> None:
    """Set every weight and bias of these layers to zero, in place."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
