"""The page in a real Chromium: extra `browser`, and Debian's `chromium` in the path; see README."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_msfp import FinetuneConfig, finetune, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A page in a process of its own: the embedded model with adapters, beside full precision."""
    folder = tmp_path_factory.mktemp("tuned")
    original, pipe = (DiffusionPipeline.from_pretrained(EMBEDDED_MODEL) for _ in range(2))
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=4)
    finetune(pipe, original, FinetuneConfig(train_steps=1, num_inference_steps=4, batch_size=2))
    pipe.save_pretrained(folder)
    command = [sys.executable, "-m", "diffusers_msfp", "space", "run", folder, "--reference", EMBEDDED_MODEL, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield json.loads(process.stdout.readline())["address"]
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page as a new visitor; at the end nothing must have been complained of."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, height: int = 900, **more):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:")) else None)
        page.goto(address)
        page.wait_for_selector("#msfp-generate")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def generate(page, seed: int, steps: int = 6) -> None:
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_label("Seed", exact=False).first.fill(str(seed))
    page.get_by_role("button", name="Generate").click()


def result(page, seed: int) -> np.ndarray:
    """The gallery's picture of a seed, once it is there."""
    thumbnail = page.locator(f"#msfp-results img[alt^='seed {seed} ']")
    thumbnail.wait_for(timeout=60_000)
    return pixels(page, thumbnail.get_attribute("src"))


def pixels(page, url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB"))


def test_a_picture_appears_and_is_crisp(visit):
    page = visit()
    generate(page, 11, steps=60)
    page.get_by_text("of 60 · timestep").wait_for()
    assert page.locator(".msfp-strip .now").count() == 1
    page.get_by_text("Done: 60 steps").wait_for(timeout=60_000)
    shown = page.locator("#msfp-pictures img")
    left, right = (pixels(page, shown.nth(i).get_attribute("src")) for i in range(2))
    assert left.shape == right.shape == (512, 512, 3)
    assert not np.array_equal(left, right)
    assert np.array_equal(left, left[::16, ::16].repeat(16, 0).repeat(16, 1))
    assert shown.first.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    both = result(page, 11)
    assert np.array_equal(both[:, :256], left[::2, ::2])
    assert np.array_equal(both[:, -256:], right[::2, ::2])


def test_the_line_moves_by_pointer_and_by_keyboard(visit):
    page = visit()
    handle = page.get_by_test_id("slider")
    handle.wait_for()

    def clip() -> str:
        return page.locator("#msfp-pictures img").nth(1).evaluate("e => e.style.clipPath")

    before = clip()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert clip() != before
    page.get_by_role("slider", name="Line between the two").focus()
    dragged = clip()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "was => document.querySelectorAll('#msfp-pictures img')[1].style.clipPath != was", arg=dragged
    )


def test_the_keyboard_alone_is_enough(visit):
    page = visit()
    page.get_by_label("Seed", exact=False).first.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("21")
    page.keyboard.press("Enter")
    result(page, 21)


@pytest.mark.parametrize("seed", ["-5", "1.5", ""])
def test_wrong_input_shows_a_message_and_keeps_the_picture(visit, seed):
    page = visit()
    page.get_by_label("Seed", exact=False).first.fill(seed)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The seed must be a whole number from 0").wait_for()
    assert page.locator("#msfp-pictures img").first.is_visible()


def test_two_visitors_at_once_get_their_own_pictures(visit):
    first, second = visit(), visit()
    generate(first, 31)
    generate(second, 32)
    theirs = [result(first, 31), result(second, 32)]
    assert not np.array_equal(*theirs)
    assert first.locator("#msfp-results img").count() == second.locator("#msfp-results img").count() == 1
    generate(first, 32)
    assert np.array_equal(result(first, 32), theirs[1])
    assert first.locator("#msfp-results img").count() == 2


def test_impatient_clicks_and_keys_are_one(visit):
    page = visit()
    page.get_by_label("number input for Steps").fill("60")
    seed = page.get_by_label("Seed", exact=False).first
    seed.fill("61")
    page.get_by_role("button", name="Generate").dblclick()
    page.get_by_text("of 60 · timestep").wait_for()
    page.get_by_role("button", name="Generate").click()
    seed.press("Enter")
    result(page, 61)
    generate(page, 62)
    result(page, 62)
    assert page.locator("#msfp-results img").count() == 2


def test_stop(visit):
    page = visit()
    generate(page, 41, steps=100)
    page.get_by_text("of 100 · timestep").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    generate(page, 42, steps=3)
    result(page, 42)
    assert page.locator("#msfp-results img").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, scheme):
    page = visit(390, 844, color_scheme=scheme)
    generate(page, 51)
    result(page, 51)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#msfp-pictures").bounding_box()["width"] >= 300


def test_every_control_has_a_name(visit):
    page = visit()
    nameless = """[...document.querySelectorAll('input, button, textarea, select')]
        .filter(e => e.offsetParent && !e.getAttribute('aria-label') && !e.labels?.length && !e.innerText?.trim())
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
