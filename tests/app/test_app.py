"""The page, in a real browser: what it shows is what the pipeline draws."""

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
from typing import Any

import gradio as gr
import numpy as np
import pytest
import tiny
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ldm import LDMPipeline
from ldm.app import page as app
from ldm.cli.main import main
from ldm.sharing import png_metadata as recipe

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
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"app.py did not come up:\n{log.read_text('utf-8')}")
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
            told = f"no browser for app.py's test: run {Path(sys.executable).parent}/playwright install chromium"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
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
            expect(page.get_by_label(f"range slider for {name}")).to_have_value(value, timeout=500 + 250 * attempt)
            return
        except AssertionError:
            continue
    pytest.fail(f"{name} stays what it was")


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def shown(page: Page, count: int) -> list[np.ndarray]:
    """The pixels of the pictures on the page, once they are drawn."""
    expect(page.locator("#status")).to_contain_text("Drawn in")
    expect(page.locator("#pictures img")).to_have_count(count)
    pictures = []
    for image in page.locator("#pictures img").all():
        answer = page.request.get(str(image.get_attribute("src")))
        assert answer.headers["content-type"] == "image/png"
        pictures.append(np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")).astype(int))
    return pictures


def test_a_prompt_becomes_the_very_picture_that_the_pipeline_draws(page: Page, pipe: LDMPipeline) -> None:
    fill(page, prompt="red heart", negative="blue", steps=5, scale=4.5, count=1, seed=7)
    draw(page)
    (found,) = shown(page, 1)
    (drawn,) = pipe("red heart", negative_prompt="blue", num_inference_steps=5, guidance_scale=4.5, seed=7).images
    assert found.std() > 5, "a flat picture proves nothing"
    assert np.abs(found - np.asarray(drawn)).max() == 0


def test_a_downloaded_picture_can_be_drawn_again_byte_for_byte(page: Page, folder: Path, tmp_path: Path) -> None:
    fill(page, prompt="rocket", negative="blue", steps=3, count=4)  # from a seed that nobody chose
    draw(page)
    shown(page, 4)
    source = str(page.locator("#pictures img").nth(2).get_attribute("src"))
    (tmp_path / "saved.png").write_bytes(page.request.get(source).body())
    assert recipe.read(tmp_path / "saved.png").prompt == "rocket"
    main(["sample", "--like", str(tmp_path / "saved.png"), str(folder), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "saved.png").read_bytes()


def test_what_was_drawn_at_random_can_be_drawn_again(page: Page, pipe: LDMPipeline) -> None:
    fill(page, prompt="rocket", steps=3)
    page.get_by_label("Prompt", exact=True).press("Enter")
    found = shown(page, 4)
    seed = int(re.findall(r"seeds (\d+) to", page.locator("#status").inner_text())[0])
    assert page.get_by_label("Seed", exact=True).input_value() == str(seed)
    drawn = pipe("rocket", num_inference_steps=3, seed=seed, num_images_per_prompt=4).images
    assert max(np.abs(one - np.asarray(other)).max() for one, other in zip(found, drawn, strict=True)) == 0

    # another press, other pictures
    sources = page.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")
    draw(page)
    expect(page.locator("#pictures img").first).not_to_have_attribute("src", sources[0])
    assert int(page.get_by_label("Seed", exact=True).input_value()) != seed


def test_small_pictures_are_shown_large_and_crisp(page: Page) -> None:
    fill(page, prompt="cat", steps=1)
    draw(page)
    shown(page, 4)
    image = page.locator("#pictures img").first
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    box = image.bounding_box()
    assert box is not None
    assert box["width"] > 200
    assert box["width"] == pytest.approx(box["height"], abs=1)


@pytest.mark.parametrize("prompt", ["cat " * 300, "<b>cat</b> " * 300])
def test_a_prompt_that_is_too_long_is_told_in_words_and_the_page_goes_on(page: Page, prompt: str) -> None:
    fill(page, prompt=prompt, steps=2, count=1)
    draw(page)
    expect(page.get_by_text("prompt: expected at most 12 tokens")).to_be_visible()
    expect(page.get_by_text(prompt[:20]).last).to_be_visible()  # as it was typed, not as HTML
    expect(page.get_by_text("Traceback")).to_have_count(0)
    assert page.locator("#pictures img").count() == 0
    fill(page, prompt="cat")
    draw(page)
    shown(page, 1)


def test_stop_stops_and_the_page_goes_on(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    fill(page, prompt="house", steps=100, count=9)
    draw(page)
    expect(page.locator("#status")).to_contain_text(re.compile(r"Step \d+ of 100"))
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    page.wait_for_timeout(500)
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator("#pictures img").count() == 0
    fill(page, steps=2, count=1)
    draw(page)
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
    _, url, _ = app.build_demo(pipe).launch(prevent_thread_lock=True, quiet=True, theme=app.THEME, css=app.CSS)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(url, wait_until="networkidle")
        yield page, pipe
    finally:
        page.close()
        gr.close_all(verbose=False)


def test_a_model_that_knows_classes_asks_for_classes_alone(page_of_classes: tuple[Page, LDMPipeline]) -> None:
    page, pipe = page_of_classes
    expect(page.get_by_role("heading", name="Draw", exact=True)).to_be_visible()
    for unasked in ("Prompt", "Negative prompt"):
        expect(page.get_by_label(unasked, exact=True)).to_have_count(0)
    page.get_by_text("Advanced settings").click()
    fill(page, steps=3, count=1, seed=2)
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="flags").click()
    page.keyboard.press("Tab")  # a dropdown tells what was chosen when it is left
    expect(page.get_by_label("Class", exact=True)).to_have_value("flags")
    draw(page)
    (found,) = shown(page, 1)
    (drawn,) = pipe(class_label="flags", num_inference_steps=3, seed=2).images
    assert found.std() > 5
    assert np.abs(found - np.asarray(drawn)).max() == 0


# --- behind the page -----------------------------------------------------------------------------------

Draw = Callable[..., Iterator[dict[Any, Any]]]


@pytest.fixture
def drawing(pipe: LDMPipeline) -> Draw:
    """The generator that the page runs, with its inputs by position."""
    functions = [one.fn for one in app.build_demo(pipe).fns.values() if one.api_name == "draw"]

    def draw(prompt: str = "cat", steps: int = 3, seed: int = 1, count: int = 1) -> Iterator[dict[Any, Any]]:
        request = gr.Request(session_hash=f"visitor {seed}")
        return functions[0](prompt, None, None, "", steps, 3.0, count, seed, False, request)

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
        alone = pipe("cat", num_inference_steps=8, seed=seed).images[0]
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
    demo = app.build_demo(pipe)
    assert demo._queue.max_size == app.MOST_WAITING
    assert demo.analytics_enabled is False
    assert [one.concurrency_limit for one in demo.fns.values() if one.api_name == "draw"] == [1]


# --- the command line ----------------------------------------------------------------------------------


def test_the_default_model_is_the_first_that_exists(folder: Path, tmp_path: Path) -> None:
    assert app.default_model((str(tmp_path), str(folder))) == str(folder)
    with pytest.raises(FileNotFoundError, match="make one with `make demo`"):
        app.default_model((str(tmp_path),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"error: no model in models/openmoji64 or runs/demo/pipeline; make one with `make demo`"),
        (["--model", "./nowhere"], r"error: nowhere is not a pipeline folder"),
    ],
)
def test_without_a_model_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match=message):
        app.main()
