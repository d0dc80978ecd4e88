"""Takes the picture of the HTML report that the README shows, one table, in a real Chromium.

make report-picture, or
python benchmark/report_picture.py docs/standard.html docs/images/report.png synthetic-v0-figures
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1280, "height": 1360}


def main() -> None:
    """Opens the report at an element, and writes what is seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("element", help="id of the element at the top of the picture")
    parser.add_argument("--sandbox", action=argparse.BooleanOptionalAction, default=True, help="off for root")
    told = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("expected chromium on the PATH (Debian: apt-get install chromium)")
    flags = ["--disable-gpu", *([] if told.sandbox else ["--no-sandbox"])]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(told.report.resolve().as_uri())
        page.evaluate("id => document.getElementById(id).scrollIntoView()", told.element)
        page.screenshot(path=told.out)
        browser.close()
    print(f"{told.out}: {told.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
