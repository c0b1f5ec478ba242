"""The page, in a real browser: what it shows is what the pipeline generates."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import tiny
import torch
from gradio.data_classes import ImageData
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ldm import LDMPipeline
from ldm.app import page as app
from ldm.cli.find import default_model
from ldm.cli.main import main
from ldm.data.images import decode
from ldm.data.numbers import Numbers
from ldm.diffusion.schedule import NoiseSchedule
from ldm.inference.defaults import Defaults
from ldm.models.fingerprint import model_sha256
from ldm.models.lora import LoRAConfig, add_adapters
from ldm.sharing import png_metadata

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
MAC_BROWSERS = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PROMPTS = ("red heart", "flag: japan")
SECONDS = 30_000  # playwright counts milliseconds; a busy machine takes a few of these


@pytest.fixture(scope="module")
def folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_pipeline_folder, tmp_path_factory.mktemp("app") / "pipeline")
    (copy / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    return copy


@pytest.fixture(scope="module")
def pipe(folder: Path) -> LDMPipeline:
    pipe = app.load(str(folder), "auto")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- in the browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `python app.py` serves the tiny pipeline."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "app.log"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(log.parent), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        command = [sys.executable, "app.py", "--model", str(folder), "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        # its address is written at once, also into a file
        while f"the page is at {url}" not in log.read_text("utf-8"):
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.fail(f"app.py did not come up:\n{log.read_text('utf-8')}")
            time.sleep(0.2)
        assert urllib.request.urlopen(url, timeout=5).status == 200
        yield url
        assert "Traceback" not in log.read_text("utf-8")
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium of this machine, else playwright's own."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [path for path in (*map(shutil.which, BROWSERS), *MAC_BROWSERS, own) if path and Path(path).exists()]
        if not found:
            message = f"no browser for app.py's test: run {Path(sys.executable).parent}/playwright install chromium"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
        yield playwright.chromium.launch(executable_path=found[0], args=FLAGS)


@pytest.fixture(scope="module")
def browser_page(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    return page


@pytest.fixture
def page(browser_page: Page, address: str) -> Page:
    """The page as it opens, with the advanced settings unfolded."""
    browser_page.goto(address)
    expect(browser_page.get_by_label("Negative prompt")).not_to_be_visible()
    browser_page.get_by_text("Advanced settings").click()
    browser_page.wait_for_load_state("networkidle")  # inputs that are still being set up forget what is typed
    return browser_page


def fill(page: Page, **settings: Any) -> None:
    """Fill in some of: prompt, negative, steps, scale, count; a seed turns the random ones off."""
    names = {"steps": "Steps", "scale": "Guidance scale", "count": "Pictures"}
    for name, value in settings.items():
        if name == "prompt":
            page.get_by_label("Prompt", exact=True).fill(value)
        elif name == "negative":
            page.get_by_label("Negative prompt").fill(value)
        elif name == "seed":
            page.get_by_label("A new seed each time").uncheck()
            page.get_by_label("Seed", exact=True).fill(str(value))
        else:
            slide(page, names[name], str(value))


def slide(page: Page, name: str, value: str) -> None:
    """Type a value until the slider moves: one that is still being set up shows what is typed, and forgets it."""
    for attempt in range(20):
        page.get_by_label(f"number input for {name}").fill(value)
        page.keyboard.press("Tab")
        try:
            moved = page.get_by_label(f"range slider for {name}")
            expect(moved).to_have_value(value, timeout=500 + 250 * attempt)
            page.wait_for_timeout(100)  # one that was set up after that is where it began
            expect(moved).to_have_value(value, timeout=100)
            return
        except AssertionError:
            continue
    pytest.fail(f"{name} stays what it was")


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()


def shown(page: Page, count: int) -> list[np.ndarray]:
    """The pixels of the pictures on the page, once they are there."""
    expect(page.locator("#status")).to_contain_text("Generated in")
    expect(page.locator("#pictures img")).to_have_count(count)
    pictures = []
    for image in page.locator("#pictures img").all():
        answer = page.request.get(str(image.get_attribute("src")))
        assert answer.headers["content-type"] == "image/png"
        pictures.append(np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")).astype(int))
    return pictures


def test_a_prompt_becomes_the_picture_that_the_pipeline_generates(page: Page, pipe: LDMPipeline) -> None:
    fill(page, prompt="red heart", negative="blue", steps=5, scale=4.5, count=1, seed=7)
    generate(page)
    (found,) = shown(page, 1)
    (drawn,) = pipe("red heart", negative_prompt="blue", num_inference_steps=5, guidance_scale=4.5, seed=7).images
    assert found.std() > 5, "a flat picture proves nothing"
    assert np.abs(found - np.asarray(drawn)).max() == 0


def test_a_downloaded_picture_can_be_generated_again_byte_for_byte(page: Page, folder: Path, tmp_path: Path) -> None:
    fill(page, prompt="rocket", negative="blue", steps=3, count=4)  # from a random seed
    generate(page)
    shown(page, 4)
    source = str(page.locator("#pictures img").nth(2).get_attribute("src"))
    (tmp_path / "saved.png").write_bytes(page.request.get(source).body())
    assert png_metadata.read(tmp_path / "saved.png").prompt == "rocket"
    main(["sample", "--like", str(tmp_path / "saved.png"), str(folder), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "saved.png").read_bytes()


def test_a_random_seed_is_shown_and_gives_the_same_pictures_again(page: Page, pipe: LDMPipeline) -> None:
    fill(page, prompt="rocket", steps=3)
    page.get_by_label("Prompt", exact=True).press("Enter")
    found = shown(page, 4)
    seed = int(re.findall(r"seeds (\d+) to", page.locator("#status").inner_text())[0])
    assert page.get_by_label("Seed", exact=True).input_value() == str(seed)
    drawn = pipe("rocket", num_inference_steps=3, guidance_scale=3.0, seed=seed, num_images_per_prompt=4).images
    assert max(np.abs(one - np.asarray(other)).max() for one, other in zip(found, drawn, strict=True)) == 0

    # another press, other pictures
    sources = page.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")
    generate(page)
    expect(page.locator("#pictures img").first).not_to_have_attribute("src", sources[0])
    assert int(page.get_by_label("Seed", exact=True).input_value()) != seed


def test_small_pictures_are_shown_large_and_crisp(page: Page) -> None:
    fill(page, prompt="cat", steps=1)
    generate(page)
    shown(page, 4)
    image = page.locator("#pictures img").first
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    box = image.bounding_box()
    assert box is not None
    assert box["width"] > 200
    assert box["width"] == pytest.approx(box["height"], abs=1)


@pytest.mark.parametrize("prompt", ["cat " * 300, "<b>cat</b> " * 300])
def test_a_prompt_that_is_too_long_is_an_error_and_the_page_still_works(page: Page, prompt: str) -> None:
    fill(page, prompt=prompt, steps=2, count=1)
    generate(page)
    expect(page.get_by_text("prompt: expected at most 12 tokens")).to_be_visible()
    expect(page.get_by_text(prompt[:20]).last).to_be_visible()  # as it was typed, not as HTML
    expect(page.get_by_text("Traceback")).to_have_count(0)
    assert page.locator("#pictures img").count() == 0
    fill(page, prompt="cat")
    generate(page)
    shown(page, 1)


def test_stop_stops_and_the_page_still_works(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    fill(page, prompt="house", steps=100, count=9)
    generate(page)
    expect(page.locator("#status")).to_contain_text(re.compile(r"Step \d+ of 100"))
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    page.wait_for_timeout(500)
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator("#pictures img").count() == 0
    fill(page, steps=2, count=1)
    generate(page)
    shown(page, 1)


def test_an_example_fills_the_prompt(page: Page) -> None:
    for prompt in PROMPTS:
        page.get_by_role("button", name=prompt).click()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(prompt)


def test_the_page_needs_no_network(browser_page: Page, address: str) -> None:
    asked: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.goto(address, wait_until="networkidle")
    assert asked
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture
def page_of_classes(browser: Browser, tmp_path: Path) -> Iterator[tuple[Page, LDMPipeline]]:
    """The page of a model that knows classes and no text."""
    pipe = tiny.class_pipeline(tmp_path, ("food", "flags", "faces"))
    _, url, _ = app.build_page(pipe).launch(prevent_thread_lock=True, quiet=True, **app.SERVING)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(url, wait_until="networkidle")
        yield page, pipe
    finally:
        page.close()
        gr.close_all(verbose=False)


def test_a_model_of_classes_shows_classes_alone(page_of_classes: tuple[Page, LDMPipeline]) -> None:
    page, pipe = page_of_classes
    expect(page.get_by_role("heading", name="Generate pictures", exact=True)).to_be_visible()
    for unasked in ("Prompt", "Negative prompt"):
        expect(page.get_by_label(unasked, exact=True)).to_have_count(0)
    page.get_by_text("Advanced settings").click()
    page.wait_for_load_state("networkidle")
    fill(page, steps=3, count=1, seed=2)
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="flags").click()
    page.keyboard.press("Tab")  # a dropdown takes a choice over when it loses the focus
    expect(page.get_by_label("Class", exact=True)).to_have_value("flags")
    generate(page)
    (found,) = shown(page, 1)
    (drawn,) = pipe(class_label="flags", num_inference_steps=3, guidance_scale=3.0, seed=2).images
    assert found.std() > 5
    assert np.abs(found - np.asarray(drawn)).max() == 0


# --- behind the page -----------------------------------------------------------------------------------

Draw = Callable[..., Iterator[dict[Any, Any]]]


@pytest.fixture
def drawing(pipe: LDMPipeline) -> Draw:
    """The generator that the page runs, with its inputs by position."""
    functions = [one.fn for one in app.build_page(pipe).fns.values() if one.api_name == "generate"]

    def draw(prompt: str = "cat", steps: int = 3, seed: int = 1, count: int = 1) -> Iterator[dict[Any, Any]]:
        request = gr.Request(session_hash=f"visitor {seed}")
        return functions[0](request, prompt, None, None, "", steps, 3.0, count, seed, False, "16 × 16", False, False)

    return draw


def last_pictures(generator: Iterator[dict[Any, Any]]) -> list[Any]:
    *_, last = generator
    return next(change["value"] for part, change in last.items() if isinstance(part, gr.Gallery))


def test_closing_the_generator_stops_the_network_within_a_step(drawing: Draw, pipe: LDMPipeline) -> None:
    calls: list[float] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(time.monotonic()))
    try:
        generator = drawing(steps=1000, count=4)
        next(generator)
        next(generator)
        generator.close()  # what gradio does when Stop is clicked or the tab is closed
        closed = time.monotonic()
        time.sleep(0.5)
        assert len(calls) < 20
        assert sum(call > closed for call in calls) <= 1
    finally:
        hook.remove()


def test_two_visitors_get_their_own_pictures(drawing: Draw, pipe: LDMPipeline) -> None:
    # a scheduler remembers its last predictions: two drawings at once would mix
    answers: dict[int, Any] = {}

    def visit(seed: int) -> None:
        answers[seed] = last_pictures(drawing(steps=8, seed=seed))

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in (1, 2, 3)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert sorted(answers) == [1, 2, 3]
    for seed, (picture,) in answers.items():
        alone = pipe("cat", num_inference_steps=8, guidance_scale=3.0, seed=seed).images[0]
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() == 0


def test_a_failure_is_passed_on_and_the_next_drawing_works(
    drawing: Draw, pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", fail)  # whatever computes the U-Net
        with pytest.raises(MemoryError, match="too large"):
            last_pictures(drawing())
    with pytest.raises(gr.Error, match="prompt: expected at most 12 tokens"):
        last_pictures(drawing("cat " * 30))
    assert len(last_pictures(drawing(count=2))) == 2


def test_the_page_waits_in_a_bounded_queue_and_tells_nobody(pipe: LDMPipeline) -> None:
    demo = app.build_page(pipe)
    assert demo._queue.max_size == app.MOST_WAITING
    assert demo.analytics_enabled is False
    assert [one.concurrency_limit for one in demo.fns.values() if one.api_name == "generate"] == [1]


@pytest.mark.parametrize(
    ("usual", "ranges"),
    [
        (Defaults(), {"Steps": (1, 20, 100), "Guidance scale": (1, 3, 10)}),
        (Defaults(150, 12.0), {"Steps": (1, 150, 150), "Guidance scale": (1, 12, 12)}),
        (Defaults(8, 0.0, (0.2, 1.0)), {"Steps": (1, 8, 100), "Guidance scale": (0, 0, 10)}),
    ],
)
def test_the_ranges_follow_the_model(pipe: LDMPipeline, usual: Defaults, ranges: dict[str, Any]) -> None:
    """Else the page refuses the very settings that it opens with."""
    pipe.defaults, before = usual, pipe.defaults
    try:
        page = app.build_page(pipe)
        sliders = {one.label: one for one in page.blocks.values() if isinstance(one, gr.Slider)}
        assert {
            name: (one.minimum, one.value, one.maximum) for name, one in sliders.items() if name in ranges
        } == ranges
        (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]
        inputs = ["cat", None, None, "", 2, usual.guidance_scale, 1, 1, False, "16 × 16", False, False]
        (picture,) = last_pictures(function(gr.Request(session_hash="visitor"), *inputs))
        settings = png_metadata.of(picture, Path("page"))
        assert settings.guidance_scale == usual.guidance_scale
        assert tuple(settings.guidance_interval or (0.0, 1.0)) == usual.guidance_interval
    finally:
        pipe.defaults = before


def test_wide_and_tall_sizes_are_offered_and_generated(pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    large: Any = SimpleNamespace(edge=lambda name: 64, least_edge=16)
    assert app.shapes(large) == ["64 × 64", "48 × 96", "48 × 80", "80 × 48", "96 × 48"]
    monkeypatch.setattr(app, "MOST_RATIO", 4.0)
    (function,) = [one.fn for one in app.build_page(pipe).fns.values() if one.api_name == "generate"]
    assert app.shapes(pipe) == ["16 × 16", "8 × 32", "8 × 24", "24 × 8", "32 × 8"]
    inputs = ["cat", None, None, "", 2, 3.0, 1, 5, False, "32 × 8", False, False]
    (picture,) = last_pictures(function(gr.Request(session_hash="visitor"), *inputs))
    expected = pipe("cat", width=32, height=8, num_inference_steps=2, guidance_scale=3.0, seed=5).images[0]
    assert picture.size == (32, 8) and np.array_equal(picture, expected)


def test_a_model_with_a_student_is_fast_unless_the_box_is_not_ticked(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = app.load(str(folder), "torch")
    tiny.lora(folder, tmp_path / "lora", LoRAConfig(rank=2), few_steps=3)
    base.teach(tmp_path / "lora")
    base.save_pretrained(tmp_path / "model")
    pipe = app.load(str(tmp_path / "model"), "torch")
    page = app.build_page(pipe)
    (box,) = [one for one in page.blocks.values() if isinstance(one, gr.Checkbox) and one.label == "Fast"]
    assert box.value and box.visible and "3 steps of the model's student" in str(box.info)
    (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]
    inputs = ["cat", None, None, "", 2, 3.0, 1, 5, False, "16 × 16", False]
    for ticked, words in ((True, {}), (False, {"num_inference_steps": 2, "guidance_scale": 3.0})):
        news = list(function(gr.Request(session_hash="visitor"), *inputs, ticked))
        assert any(f"Step {3 if ticked else 2} of {3 if ticked else 2}" in str(new) for new in news)
        (picture,) = last_pictures(iter(news))
        assert np.array_equal(picture, pipe("cat", seed=5, **words).images[0])
        maker = pipe.student if ticked else pipe
        assert png_metadata.of(picture, Path("page")).model == model_sha256(maker, adapters=False)
    inputs[3] = "dog"
    with pytest.raises(gr.Error, match="Negative prompt: the fast student has no guidance"):
        list(function(gr.Request(session_hash="visitor"), *inputs, True))


def test_a_model_with_an_upscaler_generates_large_pictures(folder: Path, tmp_path: Path) -> None:
    """Unless the box is not ticked; either picture says how it is made again."""
    pipe = app.load(str(shutil.copytree(folder, tmp_path / "model")), "torch")
    tiny.upscale_pipeline(tmp_path / "text").save_pretrained(tmp_path / "model/upscaler")
    page = app.build_page(pipe)
    (box,) = [one for one in page.blocks.values() if isinstance(one, gr.Checkbox) and one.label == "Upscale ×2"]
    assert box.value and box.visible
    (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]
    inputs = ["cat", None, None, "", 2, 3.0, 1, 5, False, "16 × 16"]
    for ticked in (True, False):
        news = list(function(gr.Request(session_hash="visitor"), *inputs, ticked, False))
        assert any("Upscaling, step 1 of" in str(new) for new in news) is ticked
        (picture,) = last_pictures(iter(news))
        arguments: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5, "upscale": ticked}
        assert picture.size == ((32, 32) if ticked else (16, 16))
        assert np.array_equal(picture, pipe("cat", **arguments).images[0])
        assert (png_metadata.of(picture, Path("page")).upscaler is not None) is ticked


def test_a_model_of_numbers_has_a_field_for_each(tmp_path: Path) -> None:
    """Empty fields are no numbers; one that is empty beside another is named."""
    pipe = tiny.numbers_pipeline(tmp_path, Numbers(("size", "angle"), (0.5, 90.0), (0.25, 30.0)))
    page = app.build_page(pipe)
    fields = [one for one in page.blocks.values() if isinstance(one, gr.Number) and one.label != "Seed"]
    assert [one.label for one in fields] == ["size", "angle"]
    (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]

    def made(*numbers: float | None) -> Image.Image:
        inputs = ("cat", None, None, "", 2, 3.0, 1, 5, False, "16 × 16", False, False, *numbers)
        (picture,) = last_pictures(function(gr.Request(session_hash="visitor"), *inputs))
        return picture

    arguments: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
    for given, expected in (((0.75, 60), {"size": 0.75, "angle": 60}), ((None, None), None)):
        picture = made(*given)
        assert np.array_equal(picture, pipe("cat", numbers=expected, **arguments).images[0])
        assert png_metadata.of(picture, Path("page")).numbers == expected
    with pytest.raises(gr.Error, match="numbers: expected a number for angle, got None"):
        made(0.75, None)


def test_no_more_steps_than_timesteps(tmp_path: Path) -> None:
    pipe = tiny.pipeline(tmp_path, schedule=NoiseSchedule.linear(12))
    page = app.build_page(pipe)
    (steps,) = [one for one in page.blocks.values() if isinstance(one, gr.Slider) and one.label == "Steps"]
    assert (steps.value, steps.maximum) == (12, 12)


def test_an_uploaded_picture_is_decoded_as_in_training(tmp_path: Path) -> None:
    """Transparent pixels are white, and a picture that a camera turned is upright; what is broken is an error."""
    pipe = tiny.condition_pipeline(tmp_path / "text")
    stored, turned = Image.new("RGBA", (24, 16), (200, 40, 40, 255)), Image.Exif()
    stored.paste((0, 0, 0, 0), (0, 0, 24, 5))
    turned[0x0112] = 6
    stored.save(tmp_path / "second.png", exif=turned)
    page = app.build_page(pipe)
    (upload,) = [one for one in page.blocks.values() if isinstance(one, gr.Image)]
    (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]

    def generate(file: Path) -> list[Any]:
        given = upload.preprocess(ImageData(path=str(file), orig_name=file.name))
        visitor = gr.Request(session_hash="visitor")
        return last_pictures(function(visitor, "cat", None, given, "", 2, 3.0, 1, 5, False, "16 × 16", False, False))

    upright = decode((tmp_path / "second.png").read_bytes())
    assert upright.size == (16, 24)
    (picture,) = generate(tmp_path / "second.png")
    arguments: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance_interval": (0, 1), "seed": 5}
    (expected,) = pipe("cat", condition=upright, **arguments).images
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    (tmp_path / "broken.png").write_bytes((tmp_path / "second.png").read_bytes()[:-40])
    with pytest.raises(gr.Error, match="picture is broken"):
        generate(tmp_path / "broken.png")


def test_each_lora_has_a_slider_and_the_picture_names_what_counted(folder: Path, tmp_path: Path) -> None:
    pipe, plain = (LDMPipeline.from_pretrained(folder) for _ in range(2))
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    add_adapters(pipe.unet, None, LoRAConfig(rank=2))
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
    page = app.build_page(pipe)
    (weight,) = [one for one in page.blocks.values() if isinstance(one, gr.Slider) and one.label.startswith("LoRA")]
    assert (weight.label, weight.value) == ("LoRA: default", 1.0)
    (function,) = [one.fn for one in page.fns.values() if one.api_name == "generate"]

    def made(counts: float) -> Image.Image:
        inputs = ("cat", None, None, "", 2, 3.0, 1, 5, False, "16 × 16", False, False, counts)
        (picture,) = last_pictures(function(gr.Request(session_hash="visitor"), *inputs))
        return picture

    arguments: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
    half, off, whole = made(0.5), made(0), made(1)
    assert np.array_equal(np.asarray(off), np.asarray(plain("cat", **arguments).images[0]))
    pipe.set_adapters(["default"], [0.5])
    assert np.array_equal(np.asarray(half), np.asarray(pipe("cat", **arguments).images[0]))
    assert len({picture.tobytes() for picture in (half, off, whole)}) == 3
    named = [png_metadata.of(picture, Path("page")).adapters for picture in (half, off, whole)]
    assert [each and each[0]["scale"] for each in named] == [0.5, None, 1.0]


def test_a_prompt_with_line_breaks_is_one_prompt(drawing: Draw, pipe: LDMPipeline) -> None:
    for prompt in ("red\nheart", "red\n\nheart", "red\u2028heart"):
        (picture,) = last_pictures(drawing(prompt))
        assert png_metadata.of(picture, Path("page")).prompt == prompt
        alone = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, seed=1).images[0]
        assert np.array_equal(np.asarray(picture), np.asarray(alone))


# --- the command line ----------------------------------------------------------------------------------


def test_the_default_model_is_the_first_that_exists(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="name yours with --model FOLDER, or train one: `ldm data openmoji"):
        default_model()
    for name in ("runs/demo/pipeline", "models/emoji"):
        shutil.copytree(folder, tmp_path / name)
        assert default_model() == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"error: there is no model in models/emoji or runs/demo/pipeline; name yours with --model"),
        (["--model", "./nowhere"], r"error: nowhere: there is no such folder"),
    ],
)
def test_without_a_model_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["app", *arguments])
