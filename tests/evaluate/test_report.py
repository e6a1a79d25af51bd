"""The report is parsed, its media are decoded, and a real browser opens it."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

from salt_jax.evaluate.report import (
    Plot,
    Report,
    Table,
    VideoRow,
    bars,
    curves,
    render,
    write_report,
)
from salt_jax.moving_shapes import shapes

VOID = {"meta", "img", "link", "br", "input"}
NASTY = '<script>alert("1")</script> & $title ${body}'


class Page(HTMLParser):
    """All tags, the visible text, and the tags that were not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open, self.wrong = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def report() -> Report:
    world = shapes.World()
    scenes, modes = shapes.scenes(world), shapes.modes(world)
    noisy = lambda clip, i: np.where(np.arange(12)[:, None] < i, 255 - clip, clip)
    labels = ("teacher, 32 steps", "K = 2", "K = 4", "K = 8")
    videos = [
        VideoRow(
            shapes.caption(scene),
            [
                (label, noisy(shapes.render(scene, modes[7 * j], world), i))
                for i, label in enumerate(labels)
            ],
        )
        for j, scene in enumerate((scenes[0], scenes[21], scenes[47]))
    ]
    intervals = ["1 to .94", ".94 to .83", ".83 to .63", ".63 to 0"]
    steps = np.arange(0, 400, 10)
    return Report(
        title="SC-DMD on Moving Shapes",
        facts={
            "command": "python -m launch.evaluate --workdir=runs/sc_dmd",
            "seed": "0",
            "prompt": NASTY,
        },
        videos=[*videos, VideoRow(NASTY, [("K = 2", shapes.render(scenes[5], modes[3], world))])],
        tables=[
            Table(
                "Scores by number of steps",
                "solver,K,all right,shape,colour,direction,sharpness,motion,flicker".split(","),
                [
                    [s, k, "0.91", "0.93", "0.99", "0.94", "0.97", "0.75", "0.03"]
                    for s in ("Euler", "CM")
                    for k in "248"
                ],
                "Part of 64 clips whose attribute, read off the pixels, is that of the prompt.",
            )
        ],
        plots=[
            Plot(
                "Semigroup defect per interval",
                bars(
                    intervals,
                    {"student": [0.01, 0.02, 0.01, 0.03], "teacher": [0.003] * 4},
                    "defect",
                ),
                "Salt Eq. 16; lower means that two short updates land where one long update does.",
            ),
            Plot(
                "Losses",
                curves({"critic": (steps, np.exp(-steps / 100))}, "student updates", "loss"),
                "Per update.",
            ),
        ],
        fps=16,
    )


def test_is_well_formed_and_loads_nothing_from_elsewhere(report):
    text = render(report)
    page = Page(text)
    assert page.wrong == []
    assert page.open == []
    assert [page.all(tag) for tag in ("link", "iframe", "script")] == [[], [], []]
    for tag, attrs in page.tags:
        for name in {"src", "href", "poster", "srcset", "data"} & set(attrs):
            assert attrs[name].startswith("data:"), (tag, name)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in str(page.all("meta"))


def test_videos_and_pictures_decode(report):
    page = Page(render(report))
    videos, images = page.all("video"), page.all("img")
    assert (len(videos), len(images)) == (13, 2)
    clips = [clip for row in report.videos for _, clip in row.clips]
    for attrs, clip in zip(videos, clips, strict=True):
        kind, content = attrs["src"].split(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            frames = np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            )
        assert frames.shape == (9, int(attrs["height"]), int(attrs["width"]), 3) == (9, 144, 144, 3)
        assert np.abs(frames[:, 6::12, 6::12].astype(int) - clip).mean() < 4
    for attrs, plot in zip(images, report.plots, strict=True):
        content = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
        assert content == plot.png
        with Image.open(io.BytesIO(content)) as image:
            # something is drawn on the transparent ground
            assert np.asarray(image)[..., 3].max() == 255


def test_text_is_escaped_and_complete(report):
    page = Page(render(report))
    assert page.text.count(NASTY) == 2  # a fact and a caption, as plain text
    for table in report.tables:
        for word in (table.title, table.explanation, *table.header, *np.ravel(table.rows)):
            assert word in page.text
    for row in report.videos:
        assert row.caption in page.text
    for text in (
        report.title,
        *report.facts,
        *report.facts.values(),
        *(plot.explanation for plot in report.plots),
    ):
        assert text in page.text


def test_empty_sections_are_left_out():
    page = Page(render(Report("Nothing yet", {}, [], [], [], 16)))
    assert "Nothing yet" in page.text
    assert page.all("section") == page.all("h2") == []


def test_refuses_a_table_with_a_missing_cell():
    table = Table("Scores", ["solver", "K"], [["Euler"]], "")
    with pytest.raises(ValueError, match=r"table 'Scores'.*\['Euler'\].*\['solver', 'K'\]"):
        render(Report("r", {}, [], [table], [], 16))


def test_a_bar_is_as_tall_as_its_value():
    """The height of each bar is counted in pixels of its colour."""
    with Image.open(io.BytesIO(bars(["a", "b"], {"s": [1.0, 2.0]}, "y"))) as image:
        pixels = np.asarray(image.convert("RGBA")).astype(int)
    blue = np.all(pixels == [0x3B, 0x82, 0xF6, 255], axis=-1)
    blue[: pixels.shape[0] // 7] = False  # the legend
    heights = blue.sum(0)[blue.any(0)]
    assert len(np.unique(heights)) == 2
    assert heights.max() / heights.min() == pytest.approx(2, rel=0.02)


def test_opens_in_a_browser(report, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium on PATH (Debian: apt-get install chromium)")
    path = tmp_path / "report.html"
    write_report(path, report)
    probe = """<script>addEventListener("load", () => {
        const count = (tag, good) => [...document.querySelectorAll(tag)].filter(good).length;
        const shown = v => v.readyState >= 2 && v.videoWidth == 144;
        document.body.dataset.videos = count("video", shown);
        document.body.dataset.images = count("img", i => i.complete && i.naturalWidth > 0);
        document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    })</script>"""
    path.write_text(path.read_text().replace("</body>", probe + "</body>"))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking "
        "--disable-component-update --disable-sync --window-size=400,800"
    )
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (body,) = Page(result.stdout).all("body")
    assert body == {"data-videos": "13", "data-images": "2", "data-wide": "false"}, result.stderr[
        -2000:
    ]
