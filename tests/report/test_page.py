"""The page: what is on it, that nothing from outside gets into its markup, and that a browser shows it."""

import base64
import functools
import json
import re
import shutil
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from helpers import TINY, call, events, tiny
from helpers import run as train
from PIL import Image

from fasttrain.data.scan import scan
from fasttrain.report import page
from fasttrain.report.markup import element, name, shorten
from fasttrain.report.runs import DEFAULTS, Options, read_run

CPU = Options(device="cpu")
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title='owned'</script>",
    "\" onload='document.title=1' x=\"",
    "'--><svg onload=alert(1)>&amp;&lt;",
    "\u202egnp.exe\u2066 \u05d0\u05d1",
    "n" * 200,  # as long as a folder's name may be
]


class Parsed(HTMLParser):
    """The elements and attributes of a page, and its text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: set[tuple[str, str]] = set()
        self.count: dict[str, int] = {}
        self.texts: list[str] = []
        self.values: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.found |= {(tag, "")} | {(tag, key) for key, _ in attrs}
        self.values += [f"{key}={value}" for key, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def runs(demo_set, tmp_path_factory) -> Path:
    """Two small runs on the demo set, in the folders one and two."""
    home = tmp_path_factory.mktemp("runs")
    for out, rate in (("one", 0.05), ("two", 0.002)):
        call("run", *TINY, "--data", demo_set, "--epochs", 2, "--lr", rate, "--out", home / out)
    return home


@pytest.fixture(scope="module")
def html(runs) -> str:
    return page.build([runs / "one"], options=CPU)


def test_a_page_has_the_runs_figures(runs, html):
    parsed = Parsed(html)
    assert parsed.stack == []
    best = max((event for event in events(runs / "one") if event["event"] == "eval"), key=lambda event: event["top1"])
    for part in (
        f"best top-1 {best['top1']:.2%}",
        f"{best['calibration_error']:.2%}",
        "500 training images, 250 validation images, 10 classes",
        "learning rate",
        "Reliability diagram",
        "taken for",
        "optim.lr 0.05 0.1",
        "A batch as the network saw it",
        "started; 20 steps planned",
        "The whole recipe.toml",
    ):
        assert part in parsed.text, part
    assert "Not shown" not in parsed.text and "Missing" not in parsed.text
    recalls = re.findall(r"disc-stripes-red 25 (?:([\d.]+)%|—)", parsed.text)
    number = scan_classes(runs).index("disc-stripes-red")
    assert float(recalls[0]) == pytest.approx(100 * best["per_class"]["recall"][number], abs=0.06)


def scan_classes(runs: Path) -> list[str]:
    return json.loads((runs / "one" / "best" / "meta.json").read_text())["classes"]


def test_nothing_is_loaded_and_only_the_own_script_runs(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy and policy[1].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    parsed = Parsed(html)
    addresses = [value for value in parsed.values if re.match(r"(src|href|action|data)=", value)]
    assert addresses and all(re.match(r"(src|href)=(data:image/jpeg;base64,|#)", value) for value in addresses)
    assert parsed.count["script"] == parsed.count["style"] == 1
    assert not any(value.startswith(("on", "style=")) for value in parsed.values)
    # An image that is on the page twice is in the file once.
    pictures = re.findall(r'<image id="(i\d+)" href="data:', html)
    assert len(pictures) == len(set(pictures)) and set(re.findall(r'<use href="#(i\d+)"', html)) <= set(pictures)


def test_several_runs_are_overlaid(runs):
    parsed = Parsed(page.build([runs / "two", runs / "one"], options=CPU))
    assert "Sections about images are of one , the best of the 2 runs by top-1" in parsed.text
    assert "optim.lr 0.002 0.05" in parsed.text
    assert parsed.count["polyline"] >= 2 * 8
    common = Parsed(page.build([runs / "two", runs / "one"], data=str(demo_val(runs)), options=CPU))
    assert "Scores: of the best checkpoints, on the same 250 images." in common.text


def demo_val(runs: Path) -> Path:
    recipe = read_run(runs / "one").recipe
    return Path(recipe.data.train[0]) / "val"


def hostile_set(folder: Path, per_class: int = 4) -> None:
    rng = np.random.default_rng(0)
    for number, label in enumerate(HOSTILE):
        home = folder / label.replace("/", "\u2215")
        home.mkdir(parents=True)
        for image in range(per_class):
            pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{number}{HOSTILE[image].replace('/', '')[:60]}.jpg")
    rng = np.random.default_rng(1)
    (folder / HOSTILE[0].replace("/", "\u2215") / b"\xff\xfe.jpg".decode(errors="surrogateescape")).write_bytes(
        next(folder.glob("*/*.jpg")).read_bytes()
    )


def test_hostile_names_add_no_element_and_no_attribute(runs, html, tmp_path):
    hostile_set(tmp_path / "images")
    index, out = scan(tmp_path / "images"), tmp_path / HOSTILE[3]
    train(tiny(batch_size=6), out, index, index)
    log = out / "log.jsonl"
    rows = [json.dumps({"event": "note", "text": text * 50}) for text in HOSTILE]
    rows += [json.dumps({"event": text, "step": 1, "path": "\ud800\u202e" + text * 500}) for text in HOSTILE]
    rows += [json.dumps({"event": "train", "step": 1, "terms": {text: 1.0}, "stats": {text: 2.0}}) for text in HOSTILE]
    rows += [json.dumps({"event": "resume", "step": 2, "changed": HOSTILE, "versions": dict.fromkeys(HOSTILE, "<b>")})]
    log.write_text("\n".join(rows) + "\n" + log.read_text())
    recipe = (out / "recipe.toml").read_text()
    (out / "recipe.toml").write_text("# </pre><img src=x onerror=alert(1)>\n" + recipe)
    hostile = page.build([out], data=str(tmp_path / "images"), options=CPU)
    parsed, own = Parsed(hostile), Parsed(html)
    assert parsed.stack == []
    assert parsed.found <= own.found | {("line", "stroke-dasharray"), ("polyline", "stroke-dasharray"), ("title", "")}
    assert parsed.count["script"] == 1 and "alert(1)" in parsed.text  # as text
    written = hostile.encode("utf-8").decode()  # no half of a surrogate pair
    assert not set(written) & {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\0", "\x1b"}
    assert max(map(len, parsed.text.split())) <= 450 and len(hostile) < 1_000_000


def test_names_are_shortened_in_the_middle_and_escaped():
    assert shorten("abcdefghij", 5) == "ab…ij" and shorten("x" * 10**6 + "end", 9) == "xxxx…xend"
    assert name('<b>"') == "<bdi>&lt;b&gt;&quot;</bdi>"
    assert element("a", "\ud800\x00\u202e", title="'\ud800") == '<a title="&#x27;\\ud800">\\ud800\\x00\\u202e</a>'


def test_a_page_without_images_says_why(runs, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(runs / "one", moved, symlinks=True)
    text = (moved / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(re.sub(r"train = \[[^]]*\]", 'train = ["/nowhere/x"]', text))
    parsed = Parsed(page.build([moved], options=CPU))
    assert parsed.text.count("no such folder: /nowhere/x") == 2 and "top-1, validation" in parsed.text
    (moved / "log.jsonl").unlink()
    for link in ("best", "last"):
        (moved / link).unlink()
    bare = Parsed(page.build([moved], options=CPU))
    assert "Missing: curves and events: cannot read" in bare.text and "Missing: a checkpoint" in bare.text


def test_packs_and_damaged_images(runs, demo_set, tmp_path):
    call("data", "pack", demo_set, "--out", tmp_path / "pack.safetensors", "--pixels", "raw")
    call(
        "report", runs / "one", "--data", tmp_path / "pack.safetensors", "--out", tmp_path / "r.html", "--device", "cpu"
    )
    html = (tmp_path / "r.html").read_text()
    assert html.count("data:image/jpeg") > 20 and "image cannot be shown" not in html

    from fasttrain.report.thumbnails import Thumbnails

    shutil.copytree(demo_set / "val", tmp_path / "val")
    index = scan(tmp_path / "val")
    Path(index.paths[3]).write_bytes(b"no image")
    Path(index.paths[4]).unlink()
    thumbnails = Thumbnails(index)
    thumbnails.load(range(8))
    assert [number for number, found in thumbnails.pictures.items() if found is None] == [3, 4]
    assert "image cannot be shown" in thumbnails.picture(3, "text")


@pytest.mark.slow
def test_50_classes_of_25_images_stay_below_5_mb(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(50):
        home = tmp_path / "val" / f"class{number:02}"
        home.mkdir(parents=True)
        for image in range(25):
            noise = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(home / f"{image}.jpg", quality=90)
    index = scan(tmp_path / "val")
    train(tiny(epochs=1, batch_size=250), tmp_path / "run", index, index)
    html = page.build([tmp_path / "run"], data=str(tmp_path / "val"), options=CPU)
    assert html.count("data:image/jpeg") >= 60 and len(html.encode()) < 5e6
    assert len(re.findall(r'<th scope="row" data-sort="class', html)) == 50


def test_only_own_pages_are_overwritten(runs, tmp_path):
    other = tmp_path / "page.html"
    other.write_text("<!doctype html><title>mine</title>")
    result = call("report", runs / "one", "--out", other, status=2)
    assert "exists and is not a page made by fasttrain" in result.stderr
    other.unlink()
    page.write(other, page._document("t", element("p", "x")))
    page.write(other, page._document("u", element("p", "y")))
    assert "<title>u – fasttrain</title>" in other.read_text()
    result = call("report", tmp_path, "--out", other, status=2)
    assert "is not a run's folder" in result.stderr
    assert DEFAULTS.device == "auto"


def _chromium():
    selenium = pytest.importorskip("selenium.webdriver")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium with its driver")
    return selenium, browser, driver


@pytest.fixture
def browser(tmp_path):
    selenium, binary, driver = _chromium()
    options = selenium.ChromeOptions()
    options.binary_location = binary
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in f"{switches} disable-component-update disable-sync user-data-dir={tmp_path / 'profile'}".split(" "):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.chrome.service.Service(driver)
    chrome = selenium.Chrome(options=options, service=service)
    yield chrome
    chrome.quit()


@pytest.fixture
def server(tmp_path):
    """A server of a folder, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    served = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", asked
    served.shutdown()


@pytest.mark.slow
def test_a_browser_shows_the_page(runs, browser, server, tmp_path):
    hostile_set(tmp_path / "images")
    index = scan(tmp_path / "images")
    train(tiny(batch_size=6), tmp_path / "hostile", index, index)
    page.write(
        tmp_path / "hostile.html", page.build([tmp_path / "hostile"], data=str(tmp_path / "images"), options=CPU)
    )
    page.write(tmp_path / "one.html", page.build([runs / "one"], options=CPU))
    page.write(tmp_path / "two.html", page.build([runs / "one", runs / "two"], options=CPU))
    address, asked = server
    backgrounds = set()
    for file in ("one.html", "two.html", "hostile.html"):
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
                asked.clear()
                browser.get(f"{address}/{file}")
                browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
                assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), (
                    file,
                    width,
                )
                assert browser.title.endswith("– fasttrain") and "owned" not in browser.title
                assert set(asked) <= {f"/{file}"}  # which the browser may have kept from before
                assert browser.get_log("browser") == []
                backgrounds.add(
                    (scheme, browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
                )
                heights = "[...document.querySelectorAll('.thumb')].map((e) => e.getBoundingClientRect().height)"
                assert min(browser.execute_script(f"return {heights}")) > 20
    assert {scheme for scheme, _ in backgrounds} == {"light", "dark"} and len(backgrounds) == 2
    browser.get(f"{address}/one.html")
    recalls = [column(browser)]
    head = browser.execute_script("return document.querySelector('#classes th:nth-child(3) button')")
    for _ in range(2):
        browser.execute_script("arguments[0].click()", head)
        recalls.append(column(browser))
    assert recalls[1] == sorted(recalls[0], key=float) and recalls[2] == recalls[1][::-1]
    picture = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
    assert picture.startswith(b"\x89PNG")


def column(browser) -> list[str]:
    cells = "document.querySelectorAll('#classes tbody td:nth-child(3)')"
    return browser.execute_script(f"return [...{cells}].map((cell) => cell.dataset.sort)")
