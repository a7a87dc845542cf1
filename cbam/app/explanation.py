"""The content of the page of `cbam serve`: the explanation of one image, as self-contained HTML.

No file is written: figures are data URLs, and images are kept in memory until newer ones replace them.
"""

import base64
import html
import io
import logging
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbam.data import decode
from cbam.data.decode import header_of
from cbam.errors import CBAMError, DataError, InputError
from cbam.explain import page as drawing
from cbam.explain.looking import Glance, Look, Viewer, look_at_view, stages
from cbam.explain.maps import METHODS, SLOW
from cbam.explain.recording import Refinement
from cbam.explain.sheet import draw
from cbam.explain.stages import Channel, channel_gates, over_picture, top_channels, where_middle, where_reach

MAX_BYTES = 10_000_000
MAX_PIXELS = 25_000_000
MAX_MESSAGE = 400  # characters of an error message
CAPACITY = 64  # images and results that are kept
CHOICES = tuple(name for name in METHODS if name not in SLOW)

_log = logging.getLogger("cbam")


class ExpiredError(InputError):
    """An image that is no longer kept."""


@dataclass(frozen=True)
class DisplayOptions:
    """How an image is shown.

    Attributes:
        target: class index, None for the first network's prediction.
        method: a key of `maps.METHODS`.
        stage: block whose gates are shown; the last one if None, or if a network has no such block.
        threshold: 0 to 1; pixels of the map below it stay grey.
        opacity: of the colours, 0 to 1.
    """

    target: int | None = None
    method: str = "gradcam"
    stage: str | None = None
    threshold: float = 0.0
    opacity: float = drawing.OPACITY


def parse_options(target, method, stage, threshold, opacity) -> DisplayOptions:
    """Validate the options of a request, which may be anything.

    Raises:
        InputError: a value that the page's controls cannot produce.
    """
    whole = target is None or (isinstance(target, int) and not isinstance(target, bool))
    if not whole or method not in CHOICES or not (stage is None or isinstance(stage, str)):
        raise InputError("the class, the map or the stage is not one of the choices")
    parts = (threshold, opacity)
    if not all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in parts):
        raise InputError("threshold and opacity must be numbers from 0 to 1")
    return DisplayOptions(target, method, stage, float(threshold), float(opacity))


class Explainer:
    """Explains images with the networks of a `Viewer`, one at a time; thread-safe."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self._models = threading.Lock()  # Grad-CAM hooks into the networks
        self._store = threading.Lock()
        self._pictures: OrderedDict[str, tuple[str, Tensor]] = OrderedDict()
        self._looks: OrderedDict[tuple, Look] = OrderedDict()

    def add(self, data: bytes, name: str) -> str:
        """Store an image, given as the bytes of a file; returns its key.

        Raises:
            DataError: too large, not an image, an animation, or damaged.
        """
        if len(data) > MAX_BYTES:
            raise DataError(f"the file has {len(data) / 1e6:.1f} MB; the limit is {MAX_BYTES // 10**6} MB")
        header = header_of(io.BytesIO(data))
        if header is not None and header.height * header.width > MAX_PIXELS:
            millions = header.height * header.width / 1e6
            most = MAX_PIXELS // 10**6
            raise DataError(f"the image has {millions:.0f} megapixels; the limit is {most}")
        if header is not None and header.animated:
            raise DataError("the image is an animation; use a still image")
        try:
            picture = self.viewer.view(decode(data))
        except DataError as error:
            raise DataError(str(error).removeprefix("the given bytes: ")) from error
        key = uuid.uuid4().hex
        with self._store:
            _put(self._pictures, key, (name, picture))
        return key

    def look(self, key: str, options: DisplayOptions) -> Look:
        """The results of all networks for a stored image.

        Raises:
            ExpiredError: the image is no longer stored. InputError, ConfigError: `options` is invalid.
        """
        what = (key, options.target, options.method)
        with self._store:
            if not isinstance(key, str) or key not in self._pictures:
                raise ExpiredError("the image is no longer stored; please upload it again")
            name, picture = self._pictures[key]
            self._pictures.move_to_end(key)
            found = self._looks.get(what)
        if found is None:
            with self._models:
                found = look_at_view(self.viewer, picture, name, target=options.target, method=options.method)
            with self._store:  # gates are kept once per image, and only of the stages that can be shown
                blocks = next((one.blocks for (own, *_), one in self._looks.items() if own == key), None)
                if blocks is None:
                    blocks = {network: stages(own) for network, own in found.blocks.items()}
                found = replace(found, blocks=blocks)
                _put(self._looks, what, found)
        return found

    def page(self, key: str, options: DisplayOptions) -> str:
        """The explanation as HTML."""
        return render(self.look(key, options), options)

    def figure(self, key: str, options: DisplayOptions) -> bytes:
        """The paper's figure of the image as PNG, with the maps as shown, without gates."""
        drawn = draw([self.look(key, options)], opacity=options.opacity, threshold=options.threshold)
        return drawing.to_bytes(drawn, "png")

    def stage_names(self) -> list[str]:
        """The blocks that can be chosen, in the order in which they run."""
        S = self.viewer.size
        with self._models:
            found = look_at_view(self.viewer, torch.zeros(3, S, S, dtype=torch.uint8))
        names = [name for blocks in found.blocks.values() for name in stages(blocks)]
        return list(dict.fromkeys(reversed(names)))[::-1]  # the last network's last stage comes last


def error_text(error: BaseException) -> str:
    """The message for the user: our own errors verbatim, others as a number that is also in the log."""
    if isinstance(error, CBAMError):
        text = str(error)  # may quote the request, so it is truncated
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}\N{HORIZONTAL ELLIPSIS}"
    number = uuid.uuid4().hex[:8]
    _log.error("explanation %s failed", number, exc_info=error)
    return f"This image could not be explained (error {number}). See the server log."


def render(seen: Look, options: DisplayOptions) -> str:
    """Render an image, its maps, and the gates of one stage as HTML."""
    parts = [f'<div class="cbam-row">{_figure(_png(seen.image), "input", html.escape(seen.target))}']
    parts += [_heat(seen, glance, options) for glance in seen.glances]
    parts.append("</div>")
    known = {network: stages(blocks) for network, blocks in seen.blocks.items()}
    names = dict.fromkeys(name for blocks in known.values() for name in blocks)
    if names and options.stage is not None and options.stage not in names:
        raise InputError(f"no stage {options.stage!r}; expected one of {', '.join(names)}")
    for network, blocks in known.items():
        parts.append(_stage(seen, network, blocks, options))
    return "".join(parts)


def _heat(seen: Look, glance: Glance, options: DisplayOptions) -> str:
    painted = drawing.blend(seen.image, glance.heat, opacity=options.opacity, threshold=options.threshold)
    title = f"{METHODS[seen.method]}, {html.escape(glance.network)}"
    caption = f"p = {glance.probability:.3f}{'' if glance.heat.any() else '; empty map'}"
    if glance.best_index != seen.index:
        caption += f"; predicts {html.escape(glance.best)} ({glance.best_probability:.3f})"
    return _figure(_png_of_floats(painted), title, caption)


def _stage(seen: Look, network: str, blocks: dict[str, Refinement], options: DisplayOptions) -> str:
    name = options.stage if options.stage in blocks else list(blocks)[-1]
    block = blocks[name]
    C, h, w = block.before.shape[1:]
    cells = []
    if (gate := block.spatial_gate) is not None:
        scale = where_middle(block), where_reach(list(blocks.values()))
        picture = over_picture(seen.image, gate[0, 0], scale, max(options.opacity, 0.2))
        low, high = (drawing.factor(float(end), scale[1]) for end in gate.aminmax())
        caption = f"{low} to {high} {_ramp(*scale)}"
        cells.append(_figure(_png_of_floats(picture), "where: spatial gate", caption))
    if (what := channel_gates(block)) is not None:
        cells.append(_histogram(*what))
    maps = [("before", block.before), *((f"after {step.kind}", step.after) for step in block.steps)]
    strengths = [(title, features[0].float().abs().mean(0)) for title, features in maps]
    top = max(float(strength.max()) for _, strength in strengths) or 1.0
    small = [_figure(_map(s, top), title, f"mean {float(s.mean()):#.3g}") for title, s in strengths]
    head = f"{html.escape(network)}, {html.escape(name)}: {C} channels, {h} × {w}"
    rows = [("feature map, mean over channels", small)]
    tops = top_channels(block, 4)
    words = drawing.describe_channels(*([channel.gate for channel in top] for top in tops))
    for word, channels in zip(words, tops, strict=True):
        rows.append((f"channels {word}, before gating", [_channel(one) for one in channels]))
    return f'<h3 class="cbam-head">{head}</h3><div class="cbam-row">{"".join(cells)}</div>' + "".join(
        f'<h4 class="cbam-head">{title}</h4><div class="cbam-row cbam-small">{"".join(figures)}</div>'
        for title, figures in rows
        if figures
    )


def _channel(channel: Channel) -> str:
    picture = _map(channel.map, float(channel.map.max()) or 1.0)
    return _figure(picture, f"no. {channel.index}", f"× {drawing.factor(channel.gate, channel.reach)}")


def _figure(source: str, title: str, caption: str) -> str:
    return (
        f'<figure class="cbam-cell"><figcaption>{title}</figcaption><img src="{source}" alt="{title}: '
        f'{_plain(caption)}"><figcaption class="cbam-note">{caption}</figcaption></figure>'
    )


def _plain(caption: str) -> str:
    return caption.partition("<")[0].strip()


def _ramp(middle: float, reach: float) -> str:
    """The colour scale of the spatial gates, with its values."""
    from matplotlib import colormaps

    colours = [colormaps[drawing.GATE](x / 8)[:3] for x in range(9)]
    ends = (drawing.factor(value, reach) for value in (middle - reach, middle, middle + reach))
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * v for v in rgb)) for rgb in colours)
    return (
        f'<span class="cbam-ramp" style="background: linear-gradient(to right, {stops})"></span>'
        f'<span class="cbam-ends">{"".join(f"<span>{end}</span>" for end in ends)}</span>'
    )


def _histogram(gates: Tensor, middle: float, reach: float) -> str:
    """A histogram of the channel gates as SVG, with the midpoint of their range dashed."""
    counts = torch.histc(gates, 24, middle - reach, middle + reach)
    bars = "".join(
        f'<rect x="{8 * i + 4}" y="{168 - 150 * n:.1f}" width="8" height="{150 * n:.1f}"/>'
        for i, n in enumerate((counts / counts.max().clamp(min=1)).tolist())
    )
    words = [(4, "start", middle - reach), (100, "middle", middle), (196, "end", middle + reach)]
    ticks = "".join(
        f'<text x="{x}" y="188" text-anchor="{at}">{drawing.factor(v, reach)}</text>' for x, at, v in words
    )
    title = f"what: gates of {len(gates)} channels"
    low, high = (drawing.factor(float(end), reach) for end in gates.aminmax())
    return (
        f'<figure class="cbam-cell"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 200 200" role="img" aria-label="{title}, {low} to {high}">'
        f'{bars}<line x1="100" x2="100" y1="10" y2="172"/>{ticks}</svg><figcaption class="cbam-note">'
        f"{low} to {high}; dashed: {drawing.describe_midpoint([middle])}</figcaption></figure>"
    )


def _map(values: Tensor, top: float) -> str:
    from matplotlib import colormaps

    return _png_of_floats(colormaps[drawing.STRENGTH]((values / top).clamp(0, 1).numpy())[..., :3])


def _png(image: Tensor) -> str:
    return _png_of_floats(drawing.pixels(image))


def _png_of_floats(values) -> str:
    """A float array (H, W, 3) in [0, 1] as the data URL of a PNG without metadata."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _put(store: OrderedDict, key, value) -> None:
    store[key] = value
    store.move_to_end(key)
    while len(store) > CAPACITY:
        store.popitem(last=False)
