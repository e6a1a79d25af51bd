"""The page in a real browser, served by the program."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from salt_jax.moving_shapes.score import each
from salt_jax.moving_shapes.shapes import World, caption, scenes
from tests.helpers import BLUE, RED, ROOT
from tests.launch.programs import program

pytestmark = pytest.mark.slow
DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "launch.serve", "--port=0", "--slots=1", "--turn=2"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield server.stdout.readline().strip()
    server.terminate()
    assert server.wait(30) in (0, -15)


@pytest.fixture
def browser(tmp_path):
    if not (DRIVER and CHROMIUM):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,1400"):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    told = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    driver.quit()
    assert not told


def wait(check, limit=60):
    """What `check` returns, once it is something."""
    until = time.monotonic() + limit
    while not (found := check()):
        assert time.monotonic() < until, "in vain"
        time.sleep(0.05)
    return found


def text(browser, name):
    return browser.find_element(By.ID, name).text


def canvas(browser, side=0):
    return browser.find_element(By.ID, f"canvas{side}")


def shown(browser, side=0):
    return int(canvas(browser, side).get_attribute("data-shown") or 0)


COLLECT = """
const canvas = arguments[0], frames = [], done = arguments[1];
let last = canvas.dataset.shown;
function look() {
  if (canvas.dataset.shown !== last) {
    last = canvas.dataset.shown;
    frames.push(Array.from(canvas.getContext("2d").getImageData(0, 0, 12, 12).data));
  }
  frames.length < 9 ? requestAnimationFrame(look) : done(frames);
}
look();
"""


def is_seen(browser, prompt):
    """Whether the scorer finds the object of a prompt in what the canvas shows next."""
    rgba = np.uint8(browser.execute_async_script(COLLECT, canvas(browser)))
    clip = rgba.reshape(1, 9, 12, 12, 4)[..., :3]
    world = World()
    captions = [caption(scene) for scene in scenes(world)]
    found, _ = each(clip, np.array([captions.index(prompt)]), world)
    return bool(found["shape"][0] and found["colour"][0])


def ask(browser, prompt, button="change"):
    field = browser.find_element(By.ID, "prompt")
    field.clear()
    field.send_keys(prompt)
    browser.find_element(By.ID, button).click()


def open_page(browser, address):
    browser.get(address)
    wait(lambda: text(browser, "status") == "Ready.")


def test_a_video_comes_and_follows_its_prompt(browser, address):
    open_page(browser, address)
    ask(browser, RED, "start")
    wait(lambda: shown(browser) > 24)
    wait(lambda: is_seen(browser, RED))
    ask(browser, BLUE)
    wait(lambda: canvas(browser).get_attribute("data-prompt") == BLUE)
    wait(lambda: is_seen(browser, BLUE))
    assert not is_seen(browser, RED)
    marks = browser.find_elements(By.CSS_SELECTOR, "#script li")
    assert [re.sub("^from .* s ", "", mark.text) for mark in marks] == [RED, BLUE]
    ask(browser, "An elephant.")
    wait(lambda: "never learnt" in text(browser, "strange"))
    browser.find_element(By.CSS_SELECTOR, "#examples button").click()
    wait(lambda: text(browser, "strange") == "")


def test_keys_pause_fork_and_two_side_by_side(browser, address):
    open_page(browser, address)
    browser.find_element(By.ID, "compare").click()
    Select(browser.find_element(By.CSS_SELECTOR, "#side1 [data-name=steps]")).select_by_value("2")
    browser.find_element(By.ID, "prompt").send_keys(Keys.ENTER)
    wait(lambda: shown(browser, 0) > 20 and shown(browser, 1) > 20)
    assert "2 steps" in browser.find_element(By.CSS_SELECTOR, "#figure1 figcaption").text
    browser.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
    wait(lambda: text(browser, "status") == "Paused.")
    wait(lambda: (before := shown(browser)) and not time.sleep(1) and shown(browser) == before)
    moment = browser.find_element(By.ID, "moment")
    moment.send_keys(Keys.HOME)
    browser.find_element(By.ID, "fork").click()
    before = shown(browser)
    wait(lambda: shown(browser) > before)
    assert not browser.find_element(By.ID, "figure1").is_displayed()


def test_downloads_play(browser, address, tmp_path):
    open_page(browser, address)
    ask(browser, RED, "start")
    wait(lambda: shown(browser) > 40)
    for link in browser.find_elements(By.CSS_SELECTOR, "#downloads a"):
        link.click()
    movie, record = tmp_path / "salt.mp4", tmp_path / "salt.json"
    there = lambda: all(file.exists() and file.stat().st_size for file in (movie, record))
    wait(lambda: there() and not list(tmp_path.glob("*.crdownload")))
    with av.open(str(movie)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 16
    assert json.loads(record.read_text())["prompts"] == {"0": RED}


def test_a_killed_tab_and_a_second_viewer(browser, address):
    """Who waits gets the slot of one who is gone; a page that is loaded again finds its video."""
    open_page(browser, address)
    ask(browser, RED, "start")
    wait(lambda: shown(browser) > 10)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    open_page(browser, address)
    ask(browser, BLUE, "start")
    wait(lambda: "You wait: place 1" in text(browser, "status") or shown(browser) > 0)
    wait(lambda: shown(browser) > 10)
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.close()
    browser.switch_to.window(second)
    before = shown(browser)
    wait(lambda: shown(browser) > before + 40)
    browser.refresh()
    wait(lambda: browser.find_element(By.ID, "timeline").is_displayed())
    health = urllib.request.urlopen(f"{address}healthz").read()
    assert json.loads(health) == {"status": "ok"}


def test_the_end_of_the_server_is_told(browser):
    command = [sys.executable, "-m", "launch.serve", "--port=0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    open_page(browser, server.stdout.readline().strip())
    ask(browser, RED, "start")
    wait(lambda: shown(browser) > 10)
    server.terminate()
    wait(lambda: text(browser, "status") == "The server stops.")
    assert server.wait(30) in (0, -15)


def test_a_port_that_is_taken_is_told(address):
    port = address.rsplit(":", 1)[1].strip("/")
    done = program("serve", f"--port={port}")
    assert done.returncode == 2 and "Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_program_may_watch_too(address, tmp_path):
    command = [sys.executable, "examples/client.py", address, BLUE, str(tmp_path), "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=90)
    pictures = [np.asarray(Image.open(file)) for file in sorted(tmp_path.glob("*.png"))]
    assert len(pictures) >= 16 and all(picture.shape == (12, 12, 3) for picture in pictures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_hard_to_reach(browser, address, scheme, tmp_path):
    """axe-core finds nothing serious, before and while a video runs; a picture of the page."""
    from axe_core_python.selenium import Axe

    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    open_page(browser, address)
    for running in (False, True):
        if running:
            ask(browser, RED, "start")
            wait(lambda: shown(browser) > 24)
        found = Axe().run(browser)["violations"]
        grave = [(v["id"], v["help"]) for v in found if v["impact"] in ("serious", "critical")]
        assert not grave
    picture = Path(os.environ.get("PAGE_PICTURE", tmp_path / "page.png"))  # that of README.md
    browser.save_screenshot(str(picture))
    assert np.asarray(Image.open(picture)).std() > 10
