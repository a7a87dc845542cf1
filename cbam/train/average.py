"""The exponential moving average of a network's weights and statistics (Polyak and Juditsky 1992).

Validation and the scoring of a checkpoint use the average; training continues from the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """average <- d average + (1 - d) weights after step n, with d = min(decay, (1 + n) / (10 + n)).

    BatchNorm's running statistics are averaged too; integer tensors are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates, self._model = decay, 0, model
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._live().items()}

    def _live(self) -> dict[str, Tensor]:
        """The network's current tensors, looked up each time, as moving a network replaces its buffers."""
        return self._model.state_dict(keep_vars=True)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        live = self._aligned()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floats], [live[n] for n in floats], 1 - decay)
        if whole := list(self.tensors.keys() - set(floats)):
            torch._foreach_copy_([self.tensors[n] for n in whole], [live[n] for n in whole])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights of the network and the average."""
        shared: dict[int, list[str]] = {}  # the names of each tensor, as modules may share one
        live = self._aligned()
        for name, tensor in live.items():
            shared.setdefault(id(tensor), []).append(name)
        for names in shared.values():
            tensor = live[names[0]]
            kept = tensor.detach().clone()
            tensor.copy_(self.tensors[names[0]])
            for name in names:
                self.tensors[name].copy_(kept)

    def _aligned(self) -> dict[str, Tensor]:
        """The network's tensors, after moving the average to their device, dtype and layout."""
        live = self._live()
        for name, tensor in live.items():
            own = self.tensors[name]
            if (own.device, own.dtype, own.stride()) != (tensor.device, tensor.dtype, tensor.stride()):
                # A resumed run may begin with a validation, and must not create inference tensors there.
                # Equal strides let the foreach kernel handle all tensors at once.
                with torch.inference_mode(False):
                    self.tensors[name] = torch.empty_like(tensor).copy_(own)
        return live

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.updates = state["updates"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])


def average_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that a checkpoint is scored with: the average, if the run keeps one."""
    return state["average"]["tensors"] if state.get("average") else state["model"]
