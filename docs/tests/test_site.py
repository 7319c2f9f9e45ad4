"""Every page of the built site in Chromium: `make test-docs`."""

import functools
import http.server
import pathlib
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_DOCS = pathlib.Path(__file__).parent.parent
_SITE = _DOCS.parent / "site"
_SCREENSHOTS = pathlib.Path(__file__).parent / "screenshots"
_PAGES = sorted(str(path.relative_to(_SITE)) for path in _SITE.rglob("*.html"))
_DESKTOP, _PHONE = 1280, 390

widths = pytest.mark.parametrize("width", [_DESKTOP, _PHONE])
pages = pytest.mark.parametrize("name", _PAGES)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and prints nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=str(_SITE))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("There is no chromium to open the site in: `apt install chromium`.")
    with sync_playwright() as playwright:
        # As root, as in containers, Chromium does not start in its sandbox.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page that must not complain, and not ask for what is elsewhere or missing."""
    page, complaints = browser.new_page(base_url=address), []

    def log(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.type}: {message.text}")

    def keep_here(route: Any) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    def check(response: Any) -> None:
        if response.status >= 400:
            complaints.append(f"{response.status} for {response.url}")

    page.on("console", log)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", check)
    page.route("**/*", keep_here)
    yield page
    page.close()
    assert complaints == []


def _open(page: Page, name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(name)
    page.wait_for_function("!window.MathJax?.startup || MathJax.startup.promise")


def test_the_site_has_been_built() -> None:
    assert _PAGES, "There is no site: `make docs` builds it."


def _assert_fits(page: Page) -> None:
    """Wide things scroll in a box of their own, and the page stays where it is."""
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def _assert_no_image_is_broken(page: Page) -> None:
    images = page.evaluate("[...document.images].map(x => [x.src, x.naturalWidth])")
    assert [source for source, width in images if width == 0] == []


def _assert_formulas_are_rendered(page: Page) -> None:
    formulas = page.locator(".math").count()
    assert page.locator("mjx-container").count() == formulas
    assert page.locator("mjx-merror").count() == 0


def _assert_tables_fit(page: Page) -> None:
    tables = page.evaluate(
        "[...document.querySelectorAll('.table-wrapper')]"
        ".map(x => [x.innerText.slice(0, 60), x.scrollWidth - x.clientWidth])"
    )
    assert [table for table in tables if table[1] > 0] == []


@functools.cache
def _ids(path: pathlib.Path) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")))


def _assert_links_lead_somewhere(page: Page, address: str) -> None:
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(x => x.href)")
    for link in set(links):
        url = urllib.parse.urlsplit(urllib.parse.unquote(link))
        if not link.startswith(address):
            assert url.scheme == "https", link
            continue
        target = _SITE / url.path.removeprefix("/")
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), link
        if url.fragment and target.suffix == ".html":
            assert url.fragment in _ids(target), link


@pages
def test_page_on_a_desktop(page: Page, address: str, name: str) -> None:
    _open(page, name, _DESKTOP)
    _assert_fits(page)
    _assert_no_image_is_broken(page)
    _assert_formulas_are_rendered(page)
    _assert_tables_fit(page)
    _assert_links_lead_somewhere(page, address)


@pages
def test_page_on_a_phone(page: Page, name: str) -> None:
    _open(page, name, _PHONE)
    _assert_fits(page)
    _assert_no_image_is_broken(page)
    _assert_formulas_are_rendered(page)


def test_the_search_finds_a_name(page: Page) -> None:
    _open(page, "index.html", _DESKTOP)
    page.get_by_placeholder("Search").fill("adapt_on_progress")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    # The results come one by one, the definition first.
    first = page.locator("#search-results li a").first.get_attribute("href") or ""
    assert first.endswith("api.html#sasa_optax.adapt_on_progress")


@widths
def test_the_front_page_has_its_parts(page: Page, width: int) -> None:
    """The pictures of it are there to be looked at."""
    _open(page, "index.html", width)
    _SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=_SCREENSHOTS / f"index-{width}.png", full_page=True)
    assert page.locator("article h1").inner_text().startswith("sasa_optax")
    assert "adapt_on_progress()" in page.locator("article pre").first.inner_text()
    assert page.locator("article img").count() == 1
    assert page.locator("article tbody tr").count() == 3
