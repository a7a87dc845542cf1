"""Write docs/methods/, a card for each attention module: `python -m docs.fill_methods`.

Text and formulas come from the docstrings; parameters and multiply-accumulates are counted.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import cbam
from cbam.models import Cost, profile
from cbam.nn import ATTENTION
from cbam.surgery import attached
from cbam.surgery.route import SLOT

FOLDER = Path(__file__).parent / "methods"
HEADS = ("Reference", "Args", "Shape", "Elsewhere")
SQUEEZE_EXCITATION = """\
    F' = M(F) F     M(F) = g sigmoid(W1 relu(W0 avgpool F + b0) + b1)

It is `cbam.ChannelAttention(channels, pools=("avg",))`: the channel gate of CBAM without the maximum.

Reference: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507, section 3.
"""
ALONE = """\
These are the arguments of `cbam.nn.{kind}`, which does not take the number of channels. To attach it with
other values, use `attention=lambda channels: cbam.nn.{kind}(kernel_size=3)`."""


class Card(NamedTuple):
    """The content of a module's page; `words` maps each head of the docstring, "" first, to its text."""

    name: str
    call: str
    make: Callable[[int], nn.Module]
    kind: type[nn.Module]
    words: dict[str, str]
    identity: bool
    parameters: int
    network: Cost


def cards() -> Iterator[Card]:
    """Yield a card for every name in `cbam.nn.ATTENTION`."""
    with torch.device("meta"):
        network = cbam.attach(cbam.build("resnet50"))
        channels = {name: vars(part)["channels"] for name, part in attached(network).items()}
        for name, make in ATTENTION.items():
            for block, count in channels.items():  # the sites are the same for every attention
                network.get_submodule(block).add_module(SLOT, make(count))
            module = make(256)
            count = sum(p.numel() for p in module.parameters())
            yield Card(
                name,
                call(name),
                make,
                type(module),
                words(name, type(module)),
                hasattr(module, "identity_"),
                count,
                profile(network),
            )


def call(name: str) -> str:
    """The expression for the function from channels to a module."""
    public = ATTENTION[name].__name__
    return f"cbam.nn.{public}" if public in cbam.nn.__all__ else f'cbam.nn.ATTENTION["{name}"]'


def words(name: str, kind: type[nn.Module]) -> dict[str, str]:
    """The docstring by its heads; a class without a reference gets formula and reference of its file."""
    if name == "se":  # a function with a one-line docstring
        own, rest = sections(SQUEEZE_EXCITATION), sections(inspect.getdoc(kind) or "")
        return rest | own | {"": f"{inspect.getdoc(ATTENTION[name])}\n\n{own['']}"}
    found = sections(inspect.getdoc(kind) or "")
    if "Reference" not in found:
        first, _, rest = (inspect.getmodule(kind).__doc__ or "").partition("\n")  # pyright: ignore
        found["Reference"] = first
        found[""] += "\n\n" + rest.partition("\nShapes:")[0].strip("\n")
    return found


def sections(doc: str) -> dict[str, str]:
    """Split a docstring by its heads; "" is the text before the first."""
    parts = re.split(rf"^({'|'.join(HEADS)}):", doc, flags=re.MULTILINE)
    found = {"": parts[0].rstrip()}
    for head, text in zip(parts[1::2], parts[2::2], strict=True):
        found[head] = text.strip("\n")
    return found


def marked(text: str) -> str:
    """Convert a docstring to Markdown: indented paragraphs become code, lines of prose are joined."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("    "):
            out.append(f"```text\n{textwrap.dedent(paragraph).rstrip()}\n```")
        elif paragraph.strip():
            out.append(textwrap.fill(re.sub(r"\s+", " ", paragraph.strip()), 116, break_on_hyphens=False))
    return "\n\n".join(out)


def arguments(card: Card) -> Iterator[str]:
    """The rows of the table of arguments, with the defaults of the signature."""
    signature = inspect.signature(card.make if inspect.isfunction(card.make) else card.kind)
    if not listed(card):
        signature = inspect.signature(card.kind)
    entries = re.split(r"^    (\w+): ", card.words["Args"], flags=re.MULTILINE)
    texts = dict(zip(entries[1::2], entries[2::2], strict=True))
    yield "| argument | default | |"
    yield "|---|---|---|"
    for parameter in signature.parameters.values():
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        yield f"| `{parameter.name}` | {default} | {' '.join(texts[parameter.name].split())} |"


def listed(card: Card) -> bool:
    """Whether the object named by `call` takes the arguments of the table."""
    return inspect.isclass(card.make) or card.make.__name__ in cbam.nn.__all__


def usage(card: Card) -> str:
    """A runnable example: the module alone, and in a network."""
    start = "" if card.identity else ', start="paper"'
    lines = [
        "import torch",
        "",
        "import cbam",
        "",
        f"attention = {card.call}(64)" if listed(card) else f"attention = cbam.nn.{card.kind.__name__}()",
        "x = torch.randn(2, 64, 32, 32)",
        "assert attention(x).shape == x.shape",
        "",
        'model = cbam.build("resnet_tiny").eval()',
        "images = torch.randn(2, 3, 64, 64)",
        "before = model(images)",
        f"cbam.attach(model, attention={card.call}{start})",
        f"assert {'' if card.identity else 'not '}torch.equal(model(images), before)",
    ]
    return "\n".join(lines)


def page(card: Card, plain: Cost) -> str:
    """The page of a card."""
    with_it = card.network
    start = (
        "`identity_()`: `cbam.attach` leaves the output of a network bit-identical."
        if card.identity
        else 'There is none; attach it with `start="paper"`, which keeps its own initialisation.'
    )
    parts = [
        f"# {title(card)}",
        f'`{card.call}`, by name `"{card.name}"`: `cbam.build("resnet50+{card.name}")`.',
        marked(card.words[""]),
        "## Arguments",
        *([] if listed(card) else [ALONE.format(kind=card.kind.__name__)]),
        "\n".join(arguments(card)),
        "## Shape",
        marked(sentence(card.words["Shape"])),
        "## Cost",
        "\n".join(
            [
                "| | parameters | GMAC |",
                "|---|---|---|",
                f"| the module, 256 channels | {card.parameters:,} | |",
                f"| ResNet50 | {plain.parameters:,} | {plain.gmac:.4f} |",
                f"| ResNet50 with it in its 16 blocks | {with_it.parameters:,} | {with_it.gmac:.4f} |",
            ]
        ),
        "10^9 multiply-accumulates of convolutions and matrix products for one 224 × 224 image.",
        "## Identity start",
        start,
        "## Usage",
        f"```python\n{usage(card)}\n```",
        "## Reference",
        marked(sentence(card.words["Reference"])),
    ]
    if "Elsewhere" in card.words:
        parts += ["## Elsewhere", marked(sentence(card.words["Elsewhere"]))]
    return "\n\n".join([*parts, "[All modules](README.md)"]) + "\n"


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


def title(card: Card) -> str:
    return "Squeeze-and-excitation" if card.name == "se" else card.kind.__name__


def index(all_cards: list[Card], plain: Cost) -> str:
    """The page that lists the cards."""
    lines = [
        "# Attention modules",
        "",
        "All modules keep the shape of the feature map, so `cbam.attach(model, attention=...)` can put any",
        "of them into any network. Tests compare each with an independent implementation of its formula.",
        "",
        "| module | name | parameters, C = 256 | ResNet50 with it | GMAC | identity start |",
        "|---|---|---|---|---|---|",
        f"| none | | | {plain.parameters / 1e6:.2f}M | {plain.gmac:.4f} | |",
    ]
    for card in all_cards:
        count = f"{card.network.parameters / 1e6:.2f}M"
        lines.append(
            f"| [{title(card)}]({card.name}.md) | `{card.name}` | {card.parameters:,} | {count} | "
            f"{card.network.gmac:.4f} | {'yes' if card.identity else 'no'} |"
        )
    lines += ["", "`make cards` generates the cards from the docstrings. The numbers are counted."]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All pages of docs/methods/ by file name."""
    all_cards = list(cards())
    with torch.device("meta"):
        plain = profile(cbam.build("resnet50"))
    found = {f"{card.name}.md": page(card, plain) for card in all_cards}
    return found | {"README.md": index(all_cards, plain)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for stale in {path.name for path in FOLDER.glob("*.md")} - made.keys():
        (FOLDER / stale).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
