"""The page of one pipeline: prompt and settings on the left, pictures on the right."""

from __future__ import annotations

import html
import importlib.util
import math
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ldm import LDMPipeline
from ldm.app.jobs import Jobs, Stopped
from ldm.app.theme import SERVING
from ldm.data.buckets import bucket_sizes
from ldm.data.images import decode
from ldm.inference.defaults import EVERYWHERE
from ldm.models.fingerprint import model_sha256
from ldm.models.lora import active_adapters
from ldm.pipelines.upscale import AT_ONCE
from ldm.sharing import png_metadata
from ldm.system.devices import best_device, best_dtype

SMALL = 128  # pixels; smaller pictures are enlarged
MOST_PICTURES = 9
MOST_WAITING = 20
TIMES = " × "
MOST_RATIO = 2.0  # of the sizes that the page offers
RANDOM_SEEDS = 2**31


def build_page(pipeline: LDMPipeline) -> gr.Blocks:
    """The page of a pipeline and the LoRAs that are loaded into it; launch it with SERVING."""
    height, width = pipeline.edge("height"), pipeline.edge("width")
    upscaler = pipeline.upscaler if pipeline.has_upscaler else None
    factor = upscaler.factor if upscaler else 1
    usual, timesteps = pipeline.defaults, pipeline.scheduler.config.num_train_timesteps
    model, sizes = model_sha256(pipeline, adapters=False), shapes(pipeline)
    behind = model_sha256(upscaler) if upscaler else None
    millions = sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6
    has_text, has_condition = pipeline.tokenizer is not None, bool(pipeline.condition_channels)
    quantities = pipeline.numbers.columns if pipeline.numbers else ()
    title = "Generate pictures from text" if has_text else "Generate pictures"
    loaded = {one.name: one.scale for one in active_adapters(pipeline)}
    student = pipeline.student if pipeline.has_student and not loaded else None
    fast_steps = student.defaults.num_inference_steps if student else 0
    fast_model = model_sha256(student) if student else None

    def make(adapters: Mapping[str, float], callback_on_step_end: Any, fast: bool, **arguments: Any) -> list[Any]:
        """Pictures with these LoRAs' weights, or by the student, and their settings inside."""
        set_weights(pipeline, adapters)
        maker, sha256 = (student, fast_model) if student and fast_model and fast else (pipeline, model)
        made: Any = maker(**arguments, callback_on_step_end=callback_on_step_end)
        passed = behind if arguments.get("upscale") else None
        png_metadata.stamp(made.images, maker, sha256, upscaler=passed, **arguments)
        images: list[Any] = made.images
        return images

    def upscaling_steps(count: int) -> int:
        """Of the upscaler's network, for so many pictures."""
        return upscaler.resolve(None, None).num_inference_steps * -(-count // AT_ONCE) if upscaler else 0

    jobs = Jobs(make)

    def begin(request: gr.Request) -> dict[Any, Any]:
        jobs.begin(request.session_hash)
        return {go: gr.update(interactive=False), stop: gr.update(interactive=True), status: "Waiting for its turn…"}

    def halt(request: gr.Request) -> None:
        # not gradio's `cancels`: what was on its way to the page then still arrives after "Stopped."
        jobs.stop(request.session_hash)

    def generate(
        request: gr.Request,
        text: str,
        label: str | None,
        picture: str | None,
        unwanted: str,
        steps: int,
        scale: float,
        count: int,
        number: int | None,
        surprise: bool,
        shape: str,
        larger: bool,
        fast: bool,
        *further: float | None,
    ) -> Iterator[dict[Any, Any]]:
        """Step after step, what changes on the page."""
        first = secrets.randbelow(RANDOM_SEEDS) if surprise or number is None else number
        started = time.monotonic()
        named, weights = dict(zip(quantities, further, strict=False)), further[len(quantities) :]
        numbers = {name: value for name, value in named.items() if value is not None}
        steps = fast_steps if fast else steps
        try:
            if fast and unwanted:
                raise ValueError("Negative prompt: the fast student has no guidance to move away from it; untick Fast")
            arguments: dict[str, Any] = {
                "prompt": text if has_text else None,
                "class_label": label,
                "numbers": numbers or None,
                "condition": decode(Path(picture).read_bytes()) if picture else None,
                "num_images_per_prompt": count,
                "seed": first,
                **({} if shape == sizes[0] else size_of(shape)),
                **({"upscale": True} if larger else {}),
            }
            if not fast:
                arguments |= {
                    "negative_prompt": unwanted or None,
                    "num_inference_steps": steps,
                    "guidance_scale": scale,
                    "guidance_interval": usual.guidance_interval,
                }
            adapters = {name: weight or 0.0 for name, weight in zip(loaded, weights, strict=True)}
            with closing(jobs.run(request.session_hash, adapters=adapters, fast=fast, **arguments)) as progress:
                for done in progress:
                    if isinstance(done, int):
                        at, of = (done, steps) if done <= steps else (done - steps, upscaling_steps(count))
                        bar = f"<div class=bar><div style='width: {at / of:.0%}'></div></div>"
                        told = f"{'Step' if done <= steps else 'Upscaling, step'} {at} of {of}"
                        yield {status: f"{told}{bar}"}
                    else:
                        seeds = f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"
                        report = f"Generated in {time.monotonic() - started:.1f} s from {seeds}."
                        columns = 1 if count == 1 else 2 if count <= 4 else 3
                        look = ["small"] * (max(done[0].size) <= SMALL)
                        shown = gr.update(value=done, columns=columns, selected_index=None, elem_classes=look)
                        yield {**idle, pictures: shown, seed: first, status: report}
        except Stopped:
            yield {**idle, status: "Stopped."}
        except Exception as error:
            yield {**idle, status: "&nbsp;"}
            if isinstance(error, ValueError):  # a bad value, which the message names
                raise gr.Error(html.escape(str(error)), print_exception=False) from None
            raise

    enlarged = ", shown enlarged" if max(height, width) * factor <= SMALL else ""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            f"# {title}\nA latent-diffusion model of {millions:.0f} million parameters. "
            f"Its pictures are {width * factor} × {height * factor} pixels{enlarged}."
        )
        with gr.Row():
            with gr.Column(scale=5):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="What should be in the picture?",
                    autofocus=True,
                    max_lines=4,
                    visible=has_text,
                )
                # inputs that this model does not take are not shown
                names = pipeline.labels.names if pipeline.labels else ()
                label = gr.Dropdown([("any", None), *names], value=None, label="Class", visible=bool(names))
                with gr.Row(visible=bool(quantities)):
                    amounts = [gr.Number(None, label=name, info="all empty: any") for name in quantities]
                # the file as it was uploaded: it is decoded as training decodes its pictures
                picture = gr.Image(
                    type="filepath", image_mode=None, label="The picture to make it of", visible=has_condition
                )
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Stop", interactive=False, scale=1)
                status = gr.HTML("&nbsp;", elem_id="status")
                quick = f"{fast_steps} steps of the model's student, without guidance"
                fast_box = gr.Checkbox(bool(student), visible=bool(student), label="Fast", info=quick)
                loras = [
                    slider(f"LoRA: {name}", 1.0 if scale is None else scale, 0, 2, info="0 is off", step=0.05)
                    for name, scale in loaded.items()
                ]
                if pipeline.example_prompts:
                    examples = [[text] for text in pipeline.example_prompts]
                    gr.Examples(examples, prompt, label="For example", examples_per_page=24)
                with gr.Accordion("Advanced settings", open=False):
                    low, high = usual.guidance_interval
                    where = "" if (low, high) == EVERYWHERE else f", where {low:g} ≤ t/T < {high:g}"
                    settings = [
                        gr.Textbox(label="Negative prompt", info="what to move away from", visible=has_text),
                        slider("Steps", usual.num_inference_steps, 1, 100, timesteps, "more: slower, finer"),
                        slider("Guidance scale", usual.guidance_scale, 1, 10, None, f"1 is off{where}", step=0.5),
                        slider("Pictures", 4, 1, MOST_PICTURES),
                    ]
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="of the first picture")
                        surprise = gr.Checkbox(True, label="A new seed each time")
                    before = " before upscaling" if upscaler else ""
                    shape = gr.Dropdown(sizes, value=sizes[0], label="Size", info=f"width × height in pixels{before}")
                    larger = {"label": f"Upscale ×{factor}", "info": "by the model's own upscaler"}
                    large = gr.Checkbox(bool(upscaler), visible=bool(upscaler), **larger)
            with gr.Column(scale=6):
                pictures = gr.Gallery(
                    show_label=False,
                    format="png",
                    height="auto",
                    object_fit="contain",
                    interactive=False,
                    elem_id="pictures",
                    elem_classes=["small"] * bool(enlarged),
                    buttons=["download", "fullscreen"],
                )

        # updates rather than components, which would appear on the page
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        begun = gr.on([prompt.submit, go.click], begin, outputs=[go, stop, status], queue=False, show_progress="hidden")
        begun.then(
            generate,
            inputs=[prompt, label, picture, *settings, seed, surprise, shape, large, fast_box, *amounts, *loras],
            outputs=[pictures, seed, status, go, stop],
            concurrency_limit=1,
            api_name="generate",
            show_progress="hidden",
        )
        stop.click(halt, queue=False)
    return page.queue(max_size=MOST_WAITING)


def set_weights(pipeline: LDMPipeline, adapters: Mapping[str, float]) -> None:
    """Let loaded LoRAs count so much; those of weight 0 cost nothing."""
    used = {name: weight for name, weight in adapters.items() if weight}
    if used:
        pipeline.enable_lora()
        pipeline.set_adapters(list(used), list(used.values()))
    elif adapters:
        pipeline.disable_lora()


def shapes(pipeline: LDMPipeline) -> list[str]:
    """The sizes to choose from, width × height: the model's own, then others of about its area, the tallest first."""
    own = pipeline.edge("width"), pipeline.edge("height")
    step = math.lcm(8, pipeline.least_edge)
    others = bucket_sizes(own[0], step, MOST_RATIO) if own[0] == own[1] and own[0] % step == 0 else ()
    return [TIMES.join(map(str, size)) for size in dict.fromkeys((own, *others))]


def size_of(shape: str) -> dict[str, int]:
    """96 × 48 => the pipeline's arguments."""
    return dict(zip(("width", "height"), map(int, shape.split(TIMES)), strict=True))


def slider(
    label: str,
    value: float,
    low: float,
    high: float,
    limit: float | None = None,
    info: str | None = None,
    step: float = 1,
) -> gr.Slider:
    """A slider whose usual range reaches as far as the model's own value; `limit` is the most that the model takes."""
    low, high = min(low, value), max(high, value)
    high = high if limit is None else min(high, limit)
    return gr.Slider(low, high, min(value, high), step=step, label=label, info=info)


def load(model: str, engine: str) -> LDMPipeline:
    """A pipeline to serve.

    Args:
        engine: torch, openvino, or auto: OpenVINO where it is installed and there is no GPU, since a page stays open
            long enough for its start to pay.
    Raises:
        ValueError: if openvino is named and can't compute the model; auto then reports it and takes torch.
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
            print(f"{error}; using torch", file=sys.stderr)
    return pipeline


def serve(pipeline: LDMPipeline, host: str, port: int | None, share: bool) -> None:
    """Serve the page until Ctrl-C, and print its address."""
    page = build_page(pipeline)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        **SERVING,
    )
    print(f"the page is at {local}{f' and {public}' if public else ''} (Ctrl-C stops it)", flush=True)
    page.block_thread()
