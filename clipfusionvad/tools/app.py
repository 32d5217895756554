"""A page in the browser for detection: drop a video, look at its curve and segments, move the thresholds."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from shutil import rmtree
from socket import create_server
from tempfile import TemporaryDirectory, mkdtemp
from threading import Event
from time import time_ns
from typing import Any
from urllib.parse import quote

from clipfusionvad.io.errors import UserError, stop_on_signals
from clipfusionvad.io.files import link_or_copy
from clipfusionvad.io.option import declared_options
from clipfusionvad.metrics.segments import Thresholds, find_segments
from clipfusionvad.tools.detect.annotate import write_annotated
from clipfusionvad.tools.detect.config import ModelOptions, SegmentOptions
from clipfusionvad.tools.detect.model import DetectionModel
from clipfusionvad.tools.detect.page import ANNOTATED, FILES, Detection, write_detection
from clipfusionvad.tools.detect.run import detect_video

# The page of a result is as high as its content, so that only the whole page scrolls.
_FIT = """new ResizeObserver(() => {this.style.height = this.contentDocument.documentElement.offsetHeight + "px"})
.observe(this.contentDocument.body)"""
_STYLE = "iframe {width: 100%; height: 60vh; border: 0} .problem {font-size: 1.1em; padding: 1em}"
_LAUNCH = {"share": False, "run_history": False, "footer_links": [], "quiet": True, "show_error": True}
# Those of the system: nothing may be loaded from the network.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass(frozen=True)
class Scored:
    """The scores of one video, kept to find other segments in them, and the folder of its results."""

    source: Path
    folder: Path
    settings: Mapping[str, Any]
    found: Detection

    def write(self, thresholds: Thresholds, annotated: bool) -> str:
        """Write the results as ``detect`` does; return HTML that shows their page and links to the files."""
        was = self.found
        segments = find_segments(was.anomaly, was.classes, was.bounds, was.seconds, was.labels, thresholds)
        info, stem = replace(was.info, path=self.source.name), self.source.stem
        found = replace(was, info=info, thresholds=thresholds, segments=segments)
        link_or_copy(self.source, video := self.folder / self.source.name)
        if annotated:
            write_annotated(video := self.folder / f"{stem}{ANNOTATED}.mp4", self.source, found)
        write_detection(self.folder, stem, found, self.settings, video.name)
        url = f"gradio_api/file={quote(str(self.folder / stem))}"
        links = (f"<a href='{url}{ending}' download>{escape(stem)}{ending}</a>" for ending in FILES)
        # The number makes the browser read the page again.
        page = f"<iframe src='{url}.html?{time_ns()}' title='result' onload='{_FIT}'></iframe>"
        return f"{page}<p>Download: {' · '.join(links)}</p>"


def serve(
    options: Sequence[ModelOptions],
    load: Callable[[ModelOptions], DetectionModel],
    thresholds: Thresholds,
    address: tuple[str, int],
) -> None:
    """Serve the page at a host and port until Ctrl-C or SIGTERM; ``load`` builds each of the models.

    Uploads and results lie in a temporary folder, which is removed at the end.
    """
    (host, port), stop = address, Event()
    try:
        create_server(address).close()
    except OSError as error:
        reason = f"{error.strerror}".partition(" (")[0]
        raise UserError(f"cannot listen on {host}:{port} ({reason}): pass another --port or --host") from error
    with TemporaryDirectory(prefix="clipfusionvad-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        try:
            import gradio
        except ImportError as error:
            raise UserError("the app needs Gradio, which is not installed: pip install gradio") from error
        page = build_page({own.checkpoint: load(own) for own in options}, thresholds, Path(folder), stop)
        theme = gradio.themes.Default(primary_hue="blue", **_FONTS).set(block_info_text_color="*neutral_600")
        given = {"server_name": host, "server_port": port, "allowed_paths": [folder], "theme": theme, "css": _STYLE}
        with stop_on_signals(stop):
            page.launch(prevent_thread_lock=True, **given, **_LAUNCH)
            print(f"app           {page.local_url} (Ctrl-C ends it)", flush=True)
            # Without a limit, a signal that another thread gets would not end the waiting.
            while not stop.wait(1):
                pass
            page.close(verbose=False)


def build_page(models: Mapping[str, DetectionModel], thresholds: Thresholds, folder: Path, stop: Event) -> Any:
    """Return the page as Gradio's ``Blocks``; ``thresholds`` are those to begin with. ``stop`` ends scoring."""
    import gradio as gr

    # The scoring of each visitor, to stop it.
    running, bar = dict[str, Event](), gr.Progress()

    def write(scored: Scored, values: Mapping[Any, Any]) -> tuple[str, float]:
        high, low, *others = (values[slider] for slider in limits)
        return scored.write(Thresholds(high, min(low, high), *others), values[annotated]), min(low, high)

    def detect(values: dict[Any, Any], request: gr.Request, progress: gr.Progress = bar) -> tuple[Any, ...]:
        old, path, model = values[state], values[video], models[values[chosen]]
        if path is None:
            return '<p class="problem">Choose a video first.</p>', values[limits[1]], old
        source, context = Path(path), copy_context()
        own = running[str(request.session_hash)] = Event()

        def on_frame(done: int, total: int | None) -> None:
            if stop.is_set() or own.is_set():
                raise UserError("stopped")
            # Frames are read by a thread of their own, in which Gradio does not know whose progress this is.
            context.run(progress, (done, total), unit="frames")

        try:
            found = detect_video(source, model, thresholds, on_frame=on_frame)
            scored = Scored(source, Path(mkdtemp(dir=folder)), model.settings, found)
            shown = write(scored, values)
        except UserError as error:
            text = escape(str(error).replace(path, source.name))
            return f'<p class="problem" role="alert">{text}</p>', values[limits[1]], old
        remove(old)
        return *shown, scored

    def change(values: dict[Any, Any]) -> Any:
        return write(values[state], values) if values[state] else gr.skip()

    def remove(old: Scored | None) -> None:
        if old:
            rmtree(old.folder, ignore_errors=True)

    def leave(request: gr.Request) -> None:
        running.pop(str(request.session_hash), Event()).set()

    # Every hour, uploads that are older than a day are removed.
    with gr.Blocks(title="ClipFusionVAD", analytics_enabled=False, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# Anomalies in a video")
        with gr.Row():
            with gr.Column():
                video = gr.File(label="Video")
                chosen = gr.Dropdown([*models], label="Model", visible=len(models) > 1)
                annotated = gr.Checkbox(label="Draw the scores into the video (takes longer, every browser plays it)")
                with gr.Row():
                    start, cancel = gr.Button("Detect", variant="primary"), gr.Button("Stop")
            with gr.Column():
                limits = _sliders(gr, thresholds)
        result = gr.HTML(min_height=120, padding=False)
        state = gr.State(delete_callback=remove)
        # Of each function, one call runs at a time; others wait.
        read, written = {state, video, chosen, annotated, *limits}, [result, limits[1]]
        scoring = gr.on([video.upload, start.click], detect, read, [*written, state], show_progress_on=result)
        moved = [annotated.input, *(slider.input for slider in limits)]
        gr.on(moved, change, read, written, show_progress_on=result, trigger_mode="always_last")
        gr.on([cancel.click, video.clear], leave, cancels=[scoring], queue=False)
        page.unload(leave)
    return page


def _sliders(gr: Any, thresholds: Thresholds) -> list[Any]:
    """Return a slider for each option of segments, in the order of the fields of ``Thresholds``."""
    sliders = []
    for declared, value in zip(declared_options(SegmentOptions).values(), vars(thresholds).values(), strict=True):
        label, info = declared.name.replace("_", " ").capitalize(), declared.option.help.partition(" (default")[0]
        most, step = (1, 0.01) if declared.option.maximum else (max(30, value), 0.1)
        sliders.append(gr.Slider(0, most, value, step=step, label=label, info=info))
    return sliders
