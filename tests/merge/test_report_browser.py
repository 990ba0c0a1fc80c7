"""The page in a real browser: it draws something, its script works, nothing is logged, requested or wider than the screen."""

from __future__ import annotations

import functools
import html
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_reports import sample_report
from toy_checkpoints import recipe_of

from taskloom.merge import merge_checkpoints
from taskloom.merge.page import write_page

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = (1280, 2400), (390, 3600)

LONG_NAMES = tuple(f"/data/experiments/2026-11/a-run-with-a-very-long-name-{number}/checkpoint-12000" for number in range(3))
PAGES = {
    "three": sample_report(layers=1, modules=1),
    "thousand": sample_report(LONG_NAMES, layers=40, modules=25, prefix="model.language_model.decoder.a_module_with_a_long_name."),
    "nine": sample_report(tuple(f"org/model-{number}" for number in range(9)), layers=24, modules=7),
    "one": sample_report(("org/" + "x" * 90,), layers=0, prefix="x" * 120),
}

# What a reader does: types into the filter, presses a heading three times.
# A window is never narrower than 500 pixels; a frame can be.
FRAME = """<!DOCTYPE html>
<html><body><iframe id="page" width="{width}" height="900" frameborder="0" srcdoc="{page}"></iframe>
<script>
const page = document.getElementById("page");
page.addEventListener("load", () => Object.assign(document.documentElement.dataset, page.contentDocument.documentElement.dataset));
</script></body></html>
"""

PROBE = """
const state = document.documentElement.dataset;
const cells = () => Array.from(document.querySelectorAll("#tensor-table tbody tr:not([hidden]) th"), (cell) => cell.textContent);
state.rows = cells().length;
state.width = innerWidth;
state.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const filter = document.getElementById("filter");
const type = (text) => { filter.value = text; filter.dispatchEvent(new Event("input")); };
type("layer1 Q_PROJ bf16");
state.filtered = cells().join(" ");
state.shown = document.getElementById("shown").value;
type("");
const kind = document.getElementById("kind");
kind.value = "copied";
kind.dispatchEvent(new Event("change"));
state.copied = cells().join(" ");
kind.value = "";
kind.dispatchEvent(new Event("change"));
const head = document.querySelector("#tensor-table th[data-column='4']");
const order = [];
for (let press = 0; press < 3; press += 1) {
  head.querySelector("button").click();
  order.push(`${head.getAttribute("aria-sort")}:${cells()[0]}:${cells().at(-1)}`);
}
state.order = order.join(" ");
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    return found


class Browser:
    """Runs the browser without a window, on one page at a time, with a profile of its own."""

    def __init__(self, command: str, profile: Path) -> None:
        self._command = [command, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=5000"]
        self._command += ["--enable-logging=stderr", "--hide-scrollbars", f"--user-data-dir={profile}"]

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=True, timeout=120)

    def dom(self, address: str) -> tuple[str, list[str]]:
        """The page's elements when its script is done, and what was logged on the console."""
        done = self._run(f"--window-size={WIDE[0]},{WIDE[1]}", "--dump-dom", address)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def picture(self, address: str, path: Path, size: tuple[int, int], dark: bool) -> list[str]:
        """A picture of the page; returns what was logged on the console."""
        theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        done = self._run(f"--window-size={size[0]},{size[1]}", theme, f"--screenshot={path}", address)
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def chromium(browser: str, tmp_path: Path) -> Browser:
    return Browser(browser, tmp_path / "profile")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, report in PAGES.items():
        write_page(report, "merge_method: ties\n", folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in PAGES}


def _marks(dom: str) -> dict[str, str]:
    opening = re.search(r"<html[^>]*>", dom)
    assert opening is not None
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', opening[0]))


def test_console_messages_are_noticed(chromium: Browser, tmp_path: Path) -> None:
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><html>{policy}<script>alert(1)</script></html>")
    assert chromium.dom((tmp_path / "bad.html").as_uri())[1]


@pytest.mark.parametrize("name", PAGES)
def test_the_script_runs_and_nothing_is_logged(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    dom, console = chromium.dom(pages[name].as_uri())
    assert console == []
    assert _marks(dom)["ready"] == str(len(PAGES[name].tensors))


@pytest.mark.parametrize(("dark", "size"), [(False, WIDE), (True, WIDE), (False, PHONE), (True, PHONE)])
@pytest.mark.parametrize("name", PAGES)
def test_pages_are_drawn(chromium: Browser, pages: dict[str, Path], tmp_path: Path, name: str, dark: bool, size: tuple[int, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    assert chromium.picture(pages[name].as_uri(), tmp_path / "page.png", size, dark) == []
    picture = image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == size
    grey = picture.convert("L")
    ground = grey.getpixel((2, 2))
    assert (ground < 60) if dark else (ground > 200)
    counts = grey.histogram()
    ink = sum(counts[150:]) if dark else sum(counts[:110])
    assert 0.003 < ink / (size[0] * size[1]) < 0.3
    # The accent colour and, where there is more than one model, the lines' colours.
    assert len(picture.getcolors(2**24)) > 50


@pytest.mark.parametrize("width", [1200, 700, 390, 320])
@pytest.mark.parametrize("name", PAGES)
def test_readers_filter_and_sort_and_nothing_is_wider_than_the_screen(
    chromium: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: int
) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pages[name].read_text(encoding="utf-8"))
    text = text.replace("</body>", f"<script>{PROBE}</script></body>")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    dom, console = chromium.dom((tmp_path / "frame.html").as_uri())
    assert console == []
    found = _marks(dom)
    report = PAGES[name]
    assert found["rows"] == str(len(report.tensors))
    assert (found["width"], found["overflow"]) == (str(width), "0")
    hits = [tensor.name for tensor in report.tensors if tensor.layer in {1, *range(10, 20)} and "q_proj" in tensor.name]
    assert found["filtered"].split() == hits
    assert found["shown"] == f"{len(hits):,} of {len(report.tensors):,} tensors"
    assert found["copied"].split() == [tensor.name for tensor in report.tensors if tensor.figures is None]
    by_size = sorted(report.tensors, key=lambda tensor: -tensor.bytes)
    first, last = by_size[0].name, by_size[-1].name
    down, up, back = found["order"].split()
    assert down == f"descending:{first}:{last}"
    assert up.startswith(f"ascending:{last}:")
    assert back == f"null:{report.tensors[0].name}:{report.tensors[-1].name}"


class _Logging(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def server(pages: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("Handler", (_Logging,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(pages["nine"].parent))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()
        thread.join()


def test_a_page_asks_for_nothing_but_itself(chromium: Browser, server: tuple[str, list[str]]) -> None:
    address, asked = server
    dom, console = chromium.dom(f"{address}/nine.html")
    assert (_marks(dom)["ready"], console) == (str(len(PAGES["nine"].tensors)), [])
    assert asked == ["/nine.html"]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "linear", "slerp", "passthrough", "consensus_ta"])
def test_pages_of_merges(chromium: Browser, models: dict[str, Path], tmp_path: Path, method: str) -> None:
    recipe = recipe_of(models, method)
    if method in ("linear", "passthrough"):
        del recipe["base_model"]
    if method in ("slerp", "passthrough"):
        recipe["models"] = [{"model": str(models["a"])}]
        recipe["parameters"] = {"t": 0.5} if method == "slerp" else {}
    report = merge_checkpoints(recipe, tmp_path / "out", report=True)
    dom, console = chromium.dom((tmp_path / "out" / "merge_report.html").as_uri())
    assert (_marks(dom)["ready"], console) == (str(len(report.tensors)), [])
