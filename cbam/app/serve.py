"""The web page of `cbam serve`, built on Gradio: an image, where networks look in it, and their gates."""

import base64
import html
import importlib.resources
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cbam.app.explanation import CHOICES, MAX_BYTES, Explainer, error_text, parse_options
from cbam.app.guard import Guard, addresses
from cbam.errors import InputError, MissingExtraError, OutputError
from cbam.explain.looking import Viewer
from cbam.explain.maps import METHODS

QUEUE = 64  # requests that wait; further ones are told to try again later
EXAMPLES = {
    "cat": "chelsea",
    "espresso": "coffee",
    "rocket": "rocket",
    "photographer": "camera",
    "astronaut": "astronaut",
}

_CSS = """
.gradio-container { max-width: 1180px !important; margin: auto; }
.cbam-row { display: grid; gap: 2px 12px; max-width: 860px; grid-template-columns: repeat(3, 1fr); }
.cbam-small { grid-template-columns: repeat(6, 1fr); }
.cbam-cell { margin: 0; min-width: 0; display: grid; grid-row: span 3; grid-template-rows: subgrid; }
.cbam-cell figcaption:first-child { align-self: end; }
.cbam-cell img, .cbam-cell svg { width: 100%; aspect-ratio: 1; display: block; margin: 2px 0; }
.cbam-small img { image-rendering: pixelated; }
.cbam-cell figcaption { font-size: 0.86rem; line-height: 1.25; overflow-wrap: anywhere; }
.cbam-cell .cbam-note { opacity: 0.72; }
.cbam-cell svg rect { fill: currentColor; opacity: 0.55; }
.cbam-cell svg line { stroke: currentColor; stroke-dasharray: 4 3; }
.cbam-cell svg text { font-size: 13px; fill: currentColor; }
.cbam-ramp { display: block; height: 7px; margin-top: 3px; border-radius: 2px; }
.cbam-ends { display: flex; justify-content: space-between; font-size: 0.78rem; }
.cbam-head { margin: 16px 0 6px; font-size: 1rem; font-weight: 600; }
#cbam-layout { display: grid; grid-template-columns: minmax(250px, 300px) 1fr; gap: 18px; align-items: start;
  grid-template-areas: "pick result" "control result"; grid-template-rows: auto 1fr; }
#cbam-pick { grid-area: pick; } #cbam-control { grid-area: control; } #cbam-result { grid-area: result; }
@media (max-width: 700px) {
  #cbam-layout { grid-template-columns: 1fr; grid-template-areas: "pick" "result" "control"; }
  .cbam-small { grid-template-columns: repeat(4, 1fr); } }
"""
_DOWNLOAD = """(data) => { if (data) { const a = document.createElement('a'); a.href = data;
  a.download = 'look.png'; document.body.append(a); a.click(); a.remove(); } return data; }"""
_EMPTY = "<p>Drop an image, or choose an example.</p>"
_CLEARED = "", None, _EMPTY  # key, class and page when no image is shown


def serve(
    viewer: Viewer, *, host: str = "127.0.0.1", port: int = 7860, say: Callable[[str], None] = print
) -> None:
    """Serve the page until interrupted. Uploads are removed from the disk once they are read.

    Raises:
        MissingExtraError: Gradio is not installed. OutputError: the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="cbam-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio receives uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        app = application(Explainer(viewer), host, port)
        server = _server(
            app, host, port, lambda: say(f"http://{addresses(host, port)[0]}/  (Ctrl-C to stop)")
        )
        try:
            server.run()
        except SystemExit as stop:
            raise OutputError(
                f"cannot serve on {host}:{port}; if the port is in use, give another --port"
            ) from stop


def _server(app, host: str, port: int, ready: Callable[[], None]):
    """A uvicorn server for `app` that calls `ready` once it listens."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    return Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_keep_alive=30))


def application(explainer: Explainer, host: str = "127.0.0.1", port: int = 7860):
    """The page behind its request filter, as an ASGI application."""
    try:
        import gradio  # pyright: ignore[reportMissingImports]
        from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError.of("cbam serve", "demo") from error
    mounted = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page(explainer), path="/",
        server_name=host, server_port=port, max_file_size=MAX_BYTES, show_error=False, ssr_mode=False,
        footer_links=[], css=_CSS, theme=_theme(), pwa=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip
    return Guard(mounted, addresses(host, port))


def _theme():
    import gradio  # pyright: ignore[reportMissingImports]

    fonts = ["system-ui", "sans-serif"]  # Gradio's default fonts come from another host
    return gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])


def page(explainer: Explainer):
    """The Gradio blocks."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    viewer = explainer.viewer
    classes = [(name, index) for index, name in enumerate(viewer.all_called())]
    blocks = explainer.stage_names()
    with gr.Blocks(title="cbam look", analytics_enabled=False, delete_cache=(60, 60)) as demo:
        key, data = gr.State(""), gr.Textbox(visible=False)
        gr.Markdown("# What and where a network attends\n" + "\n".join(f"- {line}" for line in viewer.about))
        with gr.Row(elem_id="cbam-layout"):
            with gr.Column(elem_id="cbam-pick"):
                file = gr.File(
                    label="Image (up to 10 MB and 25 megapixels)", file_types=["image"], height=160
                )
                example = gr.Radio(list(_examples()), label="Or an example", visible=bool(_examples()))
            with gr.Column(elem_id="cbam-control"):
                target = gr.Dropdown(classes, value=None, label="Evidence for the class", filterable=True)
                method = gr.Radio(
                    [(METHODS[name], name) for name in CHOICES],
                    value="gradcam",
                    label="Map",
                )
                stage = gr.Radio(
                    blocks,
                    value=blocks[-1] if blocks else None,
                    label="Stage of the gates",
                    visible=bool(blocks),
                )
                threshold = gr.Slider(
                    0, 0.95, 0, step=0.05, label="Show the map above this share of its maximum"
                )
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity of the colours")
                save = gr.Button("Download the figure of the maps")
            with gr.Column(elem_id="cbam-result"):
                result = gr.HTML(_EMPTY)
        controls = [key, target, method, stage, threshold, opacity]
        one = {
            "concurrency_limit": 1,
            "concurrency_id": "networks",
            "api_visibility": "private",
            "show_progress": "minimal",
        }
        handlers = _Handlers(explainer)
        how, taken = [method, stage, threshold, opacity], [key, target, result]
        # An upload clears the chosen example, and an example clears the upload.
        file.upload(handlers.upload, [file, *how], [*taken, example], **one)
        file.clear(lambda: (*_CLEARED, None), None, [*taken, example], api_visibility="private")
        example.input(handlers.example, [example, *how], [*taken, file], **one)
        for control in (target, method, stage):
            control.input(handlers.show, controls, result, trigger_mode="always_last", **one)
        for control in (threshold, opacity):
            control.input(handlers.show, controls, result, trigger_mode="always_last", **one)
        save.click(handlers.figure, controls, data, **one).then(None, data, data, js=_DOWNLOAD)
    demo.queue(max_size=QUEUE, api_open=False)
    return demo


class _Handlers:
    """The event handlers of the page; every error is shown as one line on it."""

    def __init__(self, explainer: Explainer) -> None:
        self._explainer = explainer

    def upload(self, path: str | None, method, stage, threshold, opacity):
        def read() -> tuple[bytes, str]:
            if not path:
                raise InputError("no image was given")
            file = Path(path)
            try:
                return file.read_bytes(), file.name
            finally:
                file.unlink(missing_ok=True)

        return self._show_new(read, method, stage, threshold, opacity)

    def example(self, name: str, method, stage, threshold, opacity):
        def read() -> tuple[bytes, str]:
            if name not in (examples := _examples()):
                raise InputError("there is no such example")
            return examples[name].read_bytes(), name

        return self._show_new(read, method, stage, threshold, opacity)

    def _show_new(self, read: Callable[[], tuple[bytes, str]], method, stage, threshold, opacity):
        """Key, class and page of a new image, and None to clear the other input.

        The previous result is removed even if the new image cannot be shown: it is of another image.
        """
        try:
            key = self._explainer.add(*read())
            options = parse_options(None, method, stage, threshold, opacity)
            first = self._explainer.look(key, options)
            return key, first.index, self._explainer.page(key, options), None
        except Exception as error:
            return "", None, _alert(error), None

    def show(self, key: str, target, method, stage, threshold, opacity) -> str:
        if not key:
            return _EMPTY
        try:
            return self._explainer.page(key, parse_options(target, method, stage, threshold, opacity))
        except Exception as error:
            return _alert(error)

    def figure(self, key: str, target, method, stage, threshold, opacity) -> str:
        if not key:
            return ""
        try:
            png = self._explainer.figure(key, parse_options(target, method, stage, threshold, opacity))
        except Exception as error:
            raise _notification(error) from None
        return "data:image/png;base64," + base64.b64encode(png).decode()


def _alert(error: Exception) -> str:
    """The error message, in place of the page."""
    return f'<p role="alert">{html.escape(error_text(error))}</p>'


def _notification(error: Exception):
    """The error message as a notification that stays until it is closed; the page remains."""
    import gradio  # pyright: ignore[reportMissingImports]

    words = html.escape(error_text(error))  # Gradio shows it as HTML
    return gradio.Error(words, duration=None, print_exception=False)


def _examples() -> dict[str, Path]:
    """Name -> path of the example images, which are part of scikit-image."""
    try:
        folder = importlib.resources.files("skimage") / "data"
    except ImportError:
        return {}
    pictures = {Path(str(path)).stem: Path(str(path)) for path in folder.iterdir()}
    return {name: pictures[stem] for name, stem in EXAMPLES.items() if stem in pictures}
