"""A page to draw on: `python app.py [--model FOLDER]`."""

from __future__ import annotations

import argparse
import html
import importlib.util
import queue
import secrets
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ldm import LDMPipeline
from ldm.inference.defaults import ENGINES
from ldm.models.fingerprint import model_sha256
from ldm.sharing import png_metadata as recipe
from ldm.system.devices import best_device, best_dtype
from ldm.system.importing import leave_quickly

DEFAULT_MODELS = ("models/openmoji64", "runs/demo/pipeline")
SMALL = 128  # pixels; smaller pictures are enlarged
MOST_PICTURES = 9
MOST_WAITING = 20
RANDOM_SEEDS = 2**31
STRICTLY = "how strictly to follow the prompt"

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]  # nothing to download
THEME = gr.themes.Default(
    primary_hue="teal", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=["ui-monospace", "monospace"]
).set(body_background_fill="*neutral_50", button_secondary_background_fill="*neutral_200")
# the gallery is as high as its pictures; small ones are enlarged without blur
CSS = """
.gradio-container > .main {max-width: 1080px !important; padding-top: 40px !important}
#pictures .grid-wrap {max-height: none !important; height: auto !important; overflow: visible}
#pictures.small img {image-rendering: pixelated}
#status {min-height: 64px}
#status div.bar {height: 6px; margin: 6px 0; border-radius: 3px; background: var(--border-color-primary)}
#status div.bar div {height: 100%; border-radius: 3px; background: var(--primary-500); transition: width .2s}
@media (min-width: 800px) {#pictures {min-height: 512px}}
"""
# what every launch of the page is given; it serves no folder, and takes no large file
SERVING: dict[str, Any] = {"theme": THEME, "css": CSS, "allowed_paths": [], "max_file_size": "32mb"}


class Stopped(Exception):
    """Raised inside the pipeline when nobody waits for its pictures any more."""


def drawing(
    pipeline: LDMPipeline, turn: threading.Lock, stopped: threading.Event, **arguments: Any
) -> Generator[int | list[Any], None, None]:
    """Draw in a thread of its own: the number of each step when it is done, and at last the pictures.

    Args:
        turn: whoever holds it draws; a scheduler keeps the state of one drawing.
        stopped: set it, or close the generator, to stop the pipeline within a step.
    Raises:
        Stopped: if it was.
        Exception: what the pipeline raises.
    """
    news: queue.SimpleQueue[int | list[Any] | Exception] = queue.SimpleQueue()

    def after_step(_: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        if stopped.is_set():
            raise Stopped
        news.put(step + 1)
        return state

    def work() -> None:
        try:
            with turn:
                if stopped.is_set():
                    raise Stopped
                drawn: Any = pipeline(**arguments, callback_on_step_end=after_step)
            news.put(drawn.images)
        except Exception as error:  # whatever it is, the one who waits must hear of it
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while isinstance(latest := news.get(), int):
            yield latest
        if isinstance(latest, Exception):
            raise latest
        yield latest
    finally:
        stopped.set()


def build_demo(pipeline: LDMPipeline) -> gr.Blocks:
    """The page for one pipeline; launch it with THEME and CSS."""
    turn = threading.Lock()
    stops: dict[str | None, threading.Event] = {}  # session => what stops its drawing
    height, width = pipeline.edge("height"), pipeline.edge("width")
    small = max(height, width) <= SMALL
    usual = pipeline.defaults
    model = model_sha256(pipeline)
    millions = sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6
    knows_text, makes_of = pipeline.tokenizer is not None, bool(pipeline.condition_channels)
    title = "Draw with words" if knows_text else "Draw"

    def begin(request: gr.Request) -> dict[Any, Any]:
        stops.setdefault(request.session_hash, threading.Event())
        return {go: gr.update(interactive=False), stop: gr.update(interactive=True), status: "Waiting for its turn…"}

    def halt(request: gr.Request) -> None:
        # not gradio's `cancels`: what was on its way to the page then still arrives after "Stopped."
        stops.get(request.session_hash, threading.Event()).set()

    def draw(
        text: str,
        label: str | None,
        picture: Any,
        unwanted: str,
        steps: int,
        scale: float,
        count: int,
        number: int | None,
        surprise: bool,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Step after step, what changes on the page."""
        stopped = stops.setdefault(request.session_hash, threading.Event())
        first = secrets.randbelow(RANDOM_SEEDS) if surprise or number is None else number
        started = time.monotonic()
        arguments = {
            "prompt": text if knows_text else None,
            "class_label": label,
            "condition": picture,
            "negative_prompt": unwanted or None,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "num_images_per_prompt": count,
            "seed": first,
        }
        try:
            with closing(drawing(pipeline, turn, stopped, **arguments)) as progress:
                for done in progress:
                    if isinstance(done, int):
                        bar = f"<div class=bar><div style='width: {done / steps:.0%}'></div></div>"
                        yield {status: f"Step {done} of {steps}{bar}"}
                    else:
                        asked = {key: value for key, value in arguments.items() if key != "num_images_per_prompt"}
                        recipe.stamp(done, pipeline, model, **asked)
                        seeds = f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"
                        told = f"Drawn in {time.monotonic() - started:.1f} s from {seeds}."
                        columns = 1 if count == 1 else 2 if count <= 4 else 3
                        shown = gr.update(value=done, columns=columns, selected_index=None)
                        yield {**idle, pictures: shown, seed: first, status: told}
        except Stopped:
            yield {**idle, status: "Stopped."}
        except Exception as error:
            yield {**idle, status: "&nbsp;"}
            if isinstance(error, ValueError):  # a bad value, which the message names
                raise gr.Error(html.escape(str(error)), print_exception=False) from None
            raise
        finally:
            stops.pop(request.session_hash, None)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(
            f"# {title}\nA latent-diffusion model of {millions:.0f} million parameters. "
            f"Its pictures are {width} × {height} pixels{', shown enlarged' if small else ''}."
        )
        with gr.Row():
            with gr.Column(scale=5):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="What shall it draw?", autofocus=True, max_lines=4, visible=knows_text
                )
                # what this model can't be told is not asked for
                names = pipeline.labels.names if pipeline.labels else ()
                label = gr.Dropdown([("any", None), *names], value=None, label="Class", visible=bool(names))
                picture = gr.Image(type="pil", label="A picture to make it of", visible=makes_of)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", scale=3)
                    stop = gr.Button("Stop", interactive=False, scale=1)
                status = gr.HTML("&nbsp;", elem_id="status")
                if pipeline.example_prompts:
                    examples = [[text] for text in pipeline.example_prompts]
                    gr.Examples(examples, prompt, label="It knows, for example", examples_per_page=24)
                with gr.Accordion("Advanced settings", open=False):
                    settings = [
                        gr.Textbox(label="Negative prompt", info="what to steer away from", visible=knows_text),
                        gr.Slider(1, 100, usual.num_inference_steps, step=1, label="Steps", info="more: slower, finer"),
                        gr.Slider(1, 10, usual.guidance_scale, step=0.5, label="Guidance scale", info=STRICTLY),
                        gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures"),
                    ]
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="of the first picture")
                        surprise = gr.Checkbox(True, label="A new seed each time")
            with gr.Column(scale=6):
                pictures = gr.Gallery(
                    show_label=False, format="png", height="auto", object_fit="contain", interactive=False,
                    elem_id="pictures", elem_classes=["small"] * small, buttons=["download", "fullscreen"],
                )  # fmt: skip

        # updates rather than components, which would appear on the page
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        begun = gr.on([prompt.submit, go.click], begin, outputs=[go, stop, status], queue=False, show_progress="hidden")
        begun.then(
            draw,
            inputs=[prompt, label, picture, *settings, seed, surprise],
            outputs=[pictures, seed, status, go, stop],
            concurrency_limit=1,
            api_name="draw",
            show_progress="hidden",
        )
        stop.click(halt, queue=False)
    return demo.queue(max_size=MOST_WAITING)


def default_model(folders: Sequence[str] = DEFAULT_MODELS) -> str:
    """The first of these pipeline folders that exists.

    Raises:
        FileNotFoundError: if none does, with the command that makes one.
    """
    for folder in folders:
        if (Path(folder) / "model_index.json").exists():
            return folder
    raise FileNotFoundError(
        f"no model in {' or '.join(folders)}; make one with `make demo`, or name yours with --model RUN/pipeline"
    )


def load(model: str, engine: str) -> LDMPipeline:
    """A pipeline to serve.

    Args:
        engine: torch, openvino, or auto: OpenVINO where it is installed and the CPU draws, since a page stays open long
            enough for what starting it costs.
    Raises:
        ValueError: if OpenVINO is asked for and can't draw it; auto then says so and takes torch.
    """
    device = torch.device("cpu") if engine == "openvino" else best_device()
    pipeline = LDMPipeline.from_pretrained(model, dtype=best_dtype(device)).to(device)
    pipeline.set_progress_bar_config(disable=True)  # the page has its own
    if engine == "openvino":
        return pipeline.enable_openvino()
    if engine == "auto" and device.type == "cpu" and importlib.util.find_spec("openvino"):
        try:
            return pipeline.enable_openvino()
        except ValueError as error:
            print(f"{error}; drawing with torch", file=sys.stderr)
    return pipeline


def main() -> None:
    """The command line."""
    leave_quickly()
    parser = argparse.ArgumentParser(description="Draw with a trained model, in the browser.")
    parser.add_argument("--model", help=f"pipeline folder or Hub id (default: {', else '.join(DEFAULT_MODELS)})")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    told = "what computes U-Net and VAE decoder (default: auto, OpenVINO where it is installed and a CPU draws)"
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto", help=told)
    parser.add_argument("--share", action="store_true", help="make a public link through gradio.live")
    arguments = parser.parse_args()
    try:
        pipeline = load(arguments.model or default_model(), arguments.engine)
        build_demo(pipeline).launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            footer_links=[],
            **SERVING,
        )
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
