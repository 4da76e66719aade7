"""A report's page in a headless Chromium.

``python -m tests.browser.report_page OUT.png RUN…`` makes the page of some runs and a picture of it.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.report.page import write_page
from tests.browser.tensorboard_page import chromium

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FAULTS = """
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const images = [...document.images];
return {
    overflow: wide,
    requests: performance.getEntriesByType('resource').map(entry => entry.name),
    broken: images.filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.alt),
    unnamed: images.filter(image => !image.alt).length
        + [...document.querySelectorAll('svg[role=img]')].filter(each => !each.getAttribute('aria-label')).length,
    twice: [...document.querySelectorAll('[id]')].map(each => each.id).filter((id, i, all) => all.indexOf(id) !== i),
};
"""
"""What must be nought or empty on a page that is whole."""


@contextlib.contextmanager
def opened(page: Path, width: int = 1400, height: int = 1000, scheme: str = "light") -> Iterator[Chrome]:
    """A browser that shows a page from its file, in a window of so many CSS pixels and a colour scheme."""
    with chromium(width, height) as browser:
        # A headless window has a least width; the device's metrics have none.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        set_scheme(browser, scheme)
        browser.get(page.resolve().as_uri())
        yield browser


def set_scheme(browser: Chrome, scheme: str) -> None:
    """Let the system ask for ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def faults(browser: Chrome) -> dict[str, Any]:
    """What is wrong with the page that is shown: see ``FAULTS``, and ``errors``, the console's."""
    found: dict[str, Any] = browser.execute_script(FAULTS)
    found["errors"] = [entry["message"] for entry in browser.get_log("browser")]  # type: ignore[no-untyped-call]
    return {name: value for name, value in found.items() if value}


def picture(browser: Chrome, path: Path) -> None:
    """Save what the window shows as PNG."""
    browser.save_screenshot(str(path))


def main() -> None:
    """Make a page and a picture of it."""
    parser = argparse.ArgumentParser(description="Save a picture of the report of some runs.")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        if not write_page(page, given.runs):
            parser.error("none of these runs is finished")
        with opened(page, given.width, given.height, given.scheme) as browser:
            picture(browser, given.out)


if __name__ == "__main__":
    main()
