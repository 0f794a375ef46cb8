"""A picture of an HTML report, as in the guide to reading the weights: pairs, with the card of one token open.

    python examples/screenshot.py out/quickstart/report.html examples/report.png

Needs playwright (`pip install -e '.[test]'`) and Chromium.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of Chromium or Chrome")
    asked = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=asked.browser, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 700})
        page.goto(asked.report.resolve().as_uri())
        page.evaluate("document.getElementById('legend').scrollIntoView()")
        page.locator("article .tokens .p4").first.hover()
        page.screenshot(path=asked.picture)
        browser.close()


if __name__ == "__main__":
    main()
