"""Write the tables of docs/dialects.md, what each CBAM in use computes: `python -m docs.fill_dialects`.

Every module is reimplemented here with its parameter names and its formula; the tables are computed by
running it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbam
from cbam.errors import CheckpointError
from docs.markers import between

PAGE = Path(__file__).parent / "dialects.md"
RESNET50 = (*3 * (256,), *4 * (512,), *6 * (1024,), *3 * (2048,))  # channels of its sixteen blocks
Module = TypeVar("Module", bound=nn.Module)
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
CHANNELS = 256


class Dialect(nn.Module):
    """A CBAM as two gates.

    Attributes:
        source: the original code and its version.
        residual: whether the input is added to the output.
    """

    source = ""
    residual = False

    def what(self, x: Tensor) -> Tensor:
        """The channel gate: (N, C, H, W) -> (N, C, 1, 1)."""
        raise NotImplementedError

    def where(self, x: Tensor) -> Tensor:
        """The spatial gate: (N, C, H, W) -> (N, 1, H, W)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        refined = x * self.what(x)
        refined = refined * self.where(refined)
        return refined + x if self.residual else refined


def holder(**children: nn.Module) -> Any:
    """A module that only holds named children; Any, so that pyright accepts the names."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def mean_and_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum over the pixels: (N, C, H, W) -> two of (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)


def over_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and maximum over the channels: (N, C, H, W) -> two of (N, 1, H, W)."""
    return x.mean(1, keepdim=True), x.amax(1, keepdim=True)


class Released(Dialect):
    """Linear layers with biases; [max, mean]; BatchNorm after the convolution."""

    source = "[Jongchan/attention-module](https://github.com/Jongchan/attention-module), 459efad"

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.ChannelGate = holder(mlp=mlp)
        conv, bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
        self.SpatialGate = holder(spatial=holder(conv=conv, bn=bn))

    def what(self, x: Tensor) -> Tensor:
        mlp = self.ChannelGate.mlp
        mean, maximum = map(mlp, mean_and_max(x))
        return (mean + maximum).sigmoid()[:, :, None, None]

    def where(self, x: Tensor) -> Tensor:
        mean, maximum = over_channels(x)
        spatial = self.SpatialGate.spatial
        return spatial.bn(spatial.conv(torch.cat((maximum, mean), 1))).sigmoid()


class Paper(Dialect):
    """W1 relu(W0 .) of both pools; the convolution of [mean; max]."""

    source = "sections 3.1 and 3.2 of [the paper](https://arxiv.org/abs/1807.06521), equations 2 and 3"

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.W0 = nn.Linear(channels, channels // reduction, bias=False)
        self.W1 = nn.Linear(channels // reduction, channels, bias=False)
        self.f = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def what(self, x: Tensor) -> Tensor:
        mean, maximum = (self.W1(F.relu(self.W0(pool.flatten(1)))) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()[:, :, None, None]

    def where(self, x: Tensor) -> Tensor:
        return self.f(torch.cat(over_channels(x), 1)).sigmoid()


class Timm(Dialect):
    """1x1 convolutions in the channel gate, optional biases; [mean, max]; BatchNorm."""

    source = (
        "timm.layers.cbam.CbamModule of [timm](https://github.com/huggingface/pytorch-image-models) 1.0.31"
    )
    biases = False

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = round(channels / reduction)
        self.channel = holder(
            fc1=nn.Conv2d(channels, hidden, 1, bias=self.biases),
            fc2=nn.Conv2d(hidden, channels, 1, bias=self.biases),
        )
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial = holder(conv=holder(conv=conv, bn=nn.BatchNorm2d(1)))

    def what(self, x: Tensor) -> Tensor:
        mean, maximum = (self.channel.fc2(F.relu(self.channel.fc1(pool))) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()

    def where(self, x: Tensor) -> Tensor:
        conv = self.spatial.conv
        return conv.bn(conv.conv(torch.cat(over_channels(x), 1))).sigmoid()


class TimmWithBiases(Timm):
    """timm's with `mlp_bias=True`."""

    source = "the same with `mlp_bias=True`"
    biases = True


class Mmyolo(Dialect):
    """Convolutions with biases throughout, no norm; [mean, max]."""

    source = "mmyolo/models/plugins/cbam.py of [mmyolo](https://github.com/open-mmlab/mmyolo), 2021152"

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = int(channels / reduction)
        fc = [nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)]
        self.channel_attention = holder(fc=nn.Sequential(*(holder(conv=conv) for conv in fc)))
        self.spatial_attention = holder(conv=holder(conv=nn.Conv2d(2, 1, 7, padding=3)))

    def what(self, x: Tensor) -> Tensor:
        first, second = (layer.conv for layer in self.channel_attention.fc)
        mean, maximum = (second(F.relu(first(pool))) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()

    def where(self, x: Tensor) -> Tensor:
        return self.spatial_attention.conv.conv(torch.cat(over_channels(x), 1)).sigmoid()


class Luuuyi(Dialect):
    """No bias and no norm; [mean, max]; the hidden layer is C // 16 for any ratio."""

    source = "[luuuyi/CBAM.PyTorch](https://github.com/luuuyi/CBAM.PyTorch), 83d3312"

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // 16
        self.ca = holder(
            fc=nn.Sequential(
                nn.Conv2d(channels, hidden, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1, bias=False),
            )
        )
        self.sa = holder(conv1=nn.Conv2d(2, 1, 7, padding=3, bias=False))

    def what(self, x: Tensor) -> Tensor:
        mean, maximum = (self.ca.fc(pool) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()

    def where(self, x: Tensor) -> Tensor:
        return self.sa.conv1(torch.cat(over_channels(x), 1)).sigmoid()


class ExternalAttention(Dialect):
    """No MLP bias, no norm, a bias after a 49x49 kernel; [max, mean]; plus the input."""

    source = (
        "[xmu-xiaoma666/External-Attention-pytorch]"
        "(https://github.com/xmu-xiaoma666/External-Attention-pytorch), d75848e"
    )
    residual = True

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        self.ca = holder(
            se=nn.Sequential(
                nn.Conv2d(channels, hidden, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1, bias=False),
            )
        )
        self.sa = holder(conv=nn.Conv2d(2, 1, 49, padding=24))

    def what(self, x: Tensor) -> Tensor:
        mean, maximum = (self.ca.se(pool) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()

    def where(self, x: Tensor) -> Tensor:
        mean, maximum = over_channels(x)
        return self.sa.conv(torch.cat((maximum, mean), 1)).sigmoid()


class Peachypie98(Dialect):
    """Linear layers with biases; no norm; [max, mean]; plus the input."""

    source = "cbam.py of [Peachypie98/CBAM](https://github.com/Peachypie98/CBAM), 03ae99d"
    residual = True

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        self.cam = holder(
            linear=nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        )
        self.sam = holder(conv=nn.Conv2d(2, 1, 7, padding=3, bias=False))

    def what(self, x: Tensor) -> Tensor:
        mean, maximum = (self.cam.linear(pool.flatten(1)) for pool in mean_and_max(x))
        return (mean + maximum).sigmoid()[:, :, None, None]

    def where(self, x: Tensor) -> Tensor:
        mean, maximum = over_channels(x)
        return self.sam.conv(torch.cat((maximum, mean), 1)).sigmoid()


class Ultralytics(Dialect):
    """One layer from C to C on the mean; [mean, max]; no norm, no bias after the convolution."""

    source = (
        "ultralytics/nn/modules/conv.py of [ultralytics](https://github.com/ultralytics/ultralytics), 007216d"
    )

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channel_attention = holder(fc=nn.Conv2d(channels, channels, 1))
        self.spatial_attention = holder(cv1=nn.Conv2d(2, 1, 7, padding=3, bias=False))

    def what(self, x: Tensor) -> Tensor:
        return self.channel_attention.fc(mean_and_max(x)[0]).sigmoid()

    def where(self, x: Tensor) -> Tensor:
        return self.spatial_attention.cv1(torch.cat(over_channels(x), 1)).sigmoid()


DIALECTS: dict[str, type[Dialect]] = {
    "released code": Released,
    "paper's text": Paper,
    "timm": Timm,
    "timm, `mlp_bias=True`": TimmWithBiases,
    "mmyolo": Mmyolo,
    "luuuyi": Luuuyi,
    "External-Attention": ExternalAttention,
    "Peachypie98": Peachypie98,
    "ultralytics": Ultralytics,
}


def drawn(module: Module, seed: int = 0) -> Module:
    """`module` in float64 and eval mode, with random parameters for which no gate is constant."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.copy_(noise + 0.5)
            else:
                inputs = value[0].numel() if value.dim() > 1 else 4
                value.copy_((noise - 0.5) * 4 / inputs**0.5)
    return module


def image() -> Tensor:
    """The input of all comparisons: two maps of 256 channels, 14 x 14."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, CHANNELS, 14, 14, generator=generator, dtype=torch.float64)


# --- properties of a module, found by running it ---------------------------------------------------


def pools(module: Dialect) -> str:
    """Which statistics of a channel affect the channel gate."""
    x = image()
    lower, raised = x.clone(), x.clone()
    top, low = x.flatten(2).max(2), x.flatten(2).min(2)
    raised.flatten(2).scatter_(2, top.indices[..., None], (top.values + 1)[..., None])
    raised.flatten(2).scatter_(2, low.indices[..., None], (low.values - 1)[..., None])
    lower.flatten(2).scatter_(2, low.indices[..., None], (low.values - 50)[..., None])
    # `lower` changes only the mean, `raised` only the maximum.
    moved = [not torch.allclose(module.what(y), module.what(x), rtol=1e-9) for y in (lower, raised)]
    return " and ".join(name for name, m in zip(("mean", "max"), moved, strict=True) if m)


def convolution(module: nn.Module) -> nn.Conv2d:
    """The spatial gate's convolution: the only one larger than 1x1."""
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))


def order(module: Dialect) -> str:
    """What the first input channel of the spatial convolution is."""
    conv = convolution(module)
    kept = conv.weight.detach().clone()
    with torch.no_grad():
        conv.weight[:, 1] = 0  # ignores the second
    x = image()
    x[:, 0] = x.amax(1) + 1  # the maximum over the channels
    other = x.clone()
    other[:, 1] -= 5  # another mean, the same maximum
    blind = torch.allclose(module.where(x), module.where(other), rtol=1e-9)
    with torch.no_grad():
        conv.weight.copy_(kept)
    return "[max, mean]" if blind else "[mean, max]"


def hidden(module: Dialect) -> str:
    """Units of the channel gate's hidden layer, with reduction 16 and with 8."""
    counts = []
    for reduction in (16, 8):
        layers = matrices(type(module)(CHANNELS, reduction))
        counts.append(str(layers[0].weight.shape[0]) if len(layers) > 1 else "none")
    return counts[0] if counts[0] == counts[1] == "none" else ", ".join(counts)


def matrices(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers of the channel gate."""
    return [
        m
        for m in module.modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    ]


def norm(module: nn.Module) -> str:
    """The norm after the spatial convolution."""
    found = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return f"BatchNorm, momentum {found[0].momentum}" if found else "none"


def adds_input(module: Dialect) -> str:
    """Whether the input is added to the refined map."""
    x = image()
    refined = x * module.what(x)
    rest = module(x) - refined * module.where(refined)
    return "yes" if torch.allclose(rest, x) else "no" if not rest.any() else "?"


def put_into_released(module: Dialect) -> cbam.CBAM | None:
    """Our module, which has the released formula, with the weights of `module`; None if they do not fit.

    What `module` lacks is set to have no effect: a bias of zero, a norm that only adds the bias. An input
    that `module` adds is not added here.
    """
    if len(matrices(module)) != 2:
        return None
    conv = convolution(module)
    ours = cbam.CBAM(CHANNELS, kernel_size=conv.kernel_size[0]).double().eval()
    with torch.no_grad():
        for layer, theirs in zip((ours.channel.fc1, ours.channel.fc2), matrices(module), strict=True):
            layer.weight.copy_(theirs.weight.flatten(1))
            layer.bias.copy_(torch.zeros(()) if theirs.bias is None else theirs.bias)
        ours.spatial.conv.weight.copy_(conv.weight.flip(1) if order(module) == "[mean, max]" else conv.weight)
        found = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        if found:
            ours.spatial.bn.load_state_dict(found[0].state_dict())
        else:
            ours.spatial.bn.weight.fill_((1 + ours.spatial.bn.eps) ** 0.5)
            ours.spatial.bn.bias.copy_(torch.zeros(()) if conv.bias is None else conv.bias)
    return ours


def difference(module: Dialect, *, training: bool) -> str:
    """The largest difference from the released formula with the same weights, on `image()`."""
    ours = put_into_released(module)
    if ours is None:
        return "not comparable"
    with torch.no_grad():
        gap = (ours.train(training)(image()) - module.train(training)(image())).abs().max().item()
    module.eval()
    return "0" if gap < 1e-12 else f"{gap:.2f}"


def brought_over(module: Dialect) -> str:
    """Whether `cbam.load_weights` can load the weights."""
    ours = cbam.CBAM(CHANNELS, kernel_size=convolution(module).kernel_size[0]).double().eval()
    if isinstance(module, Paper):
        return "no code to load from"
    try:
        loaded = cbam.load_weights(ours, module.state_dict())
    except CheckpointError as error:
        return "no: it " + str(error).partition(", which ")[2].removesuffix(". The model is unchanged")
    with torch.no_grad():
        exact = (ours(image()) - module(image())).abs().max() < 1e-12
    assert exact, loaded
    return "yes, in eval mode" if loaded.eval_only else "yes"


def in_resnet50(kind: Callable[[int], nn.Module]) -> str:
    """Parameters, in millions, of ResNet50 with such a module in every block."""
    with torch.device("meta"):
        plain = sum(p.numel() for p in cbam.build("resnet50").parameters())
        added = sum(p.numel() for c in RESNET50 for p in kind(c).parameters())
    return f"{(plain + added) / 1e6:.2f}M"


COMPUTES: dict[str, Callable[[Dialect], str]] = {
    "pools over the pixels": pools,
    "biases in the MLP": lambda m: "yes" if matrices(m)[0].bias is not None else "no",
    "hidden units, r = 16; r = 8": hidden,
    "spatial descriptor": order,
    "kernel": lambda m: " × ".join(map(str, convolution(m).kernel_size)),
    "its bias": lambda m: "no" if convolution(m).bias is None else "yes",
    "norm after it": norm,
    "adds the input": adds_input,
}
FOLLOWS: dict[str, Callable[[Dialect], str]] = {
    "parameters": lambda m: f"{sum(p.numel() for p in m.parameters()):,}",
    "ResNet50 with it": lambda m: in_resnet50(type(m)),
    "difference, eval mode": lambda m: difference(m, training=False),
    "difference, training mode": lambda m: difference(m, training=True),
    "`cbam.load_weights`": brought_over,
}


def tables() -> Iterator[str]:
    """The two tables, and the sources."""
    modules = {name: drawn(kind(CHANNELS)) for name, kind in DIALECTS.items()}
    for columns in (COMPUTES, FOLLOWS):
        yield "| | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 1) + "|"
        for name, module in modules.items():
            yield f"| {name} | " + " | ".join(find(module) for find in columns.values()) + " |"
        yield ""
    yield "Sources:"
    yield ""
    for name, kind in DIALECTS.items():
        yield f"- {name}: {kind.source}"


def filled(page: str) -> str:
    """The page with recomputed tables."""
    return between(page, BEGIN, END, "\n".join(tables()))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8")), encoding="utf-8")
