"""The HTML report in a real Chromium: sorting, keyboard, phone, dark, print, contrast, and no word to the network."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "THE REPORT IS NOT TESTED IN A BROWSER: expected chromium on the PATH (Debian: apt-get install chromium)"
playwright = pytest.importorskip("playwright.sync_api", reason="THE REPORT IS NOT TESTED IN A BROWSER: no playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true; })"
CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return parse(getComputedStyle(document.body).backgroundColor);
  };
  const seen = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
    if (!element.getClientRects().length || style.visibility === 'hidden') continue;
    const [a, b] = [parse(style.color), behind(element)].map(colour => luminance(colour.slice(0, 3)));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const key = `${element.tagName}.${element.className}`;
    if (!seen.has(key) || seen.get(key) > ratio) seen.set(key, ratio);
  }
  return Object.fromEntries(seen);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, report):
    """Opens the report; at the end nothing may have been complained about, and nothing asked of the network."""
    contexts, complaints, requests = [], [], []

    def opened(viewport=DESK, **how):
        context = browser.new_context(viewport=viewport, **how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(Path(report).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert len([url for url in requests if url.startswith("file")]) == len(contexts)


def column(page, heading):
    """The first table's column: its texts, and the sort that its heading tells."""
    return page.evaluate(
        """heading => {
          const table = document.querySelector('.sortable'), heads = [...table.tHead.rows[0].cells];
          const at = heads.findIndex(head => head.textContent.trim() === heading);
          const texts = [...table.tBodies[0].rows].map(row => row.cells[at].firstChild.textContent);
          return { texts, sort: heads[at].getAttribute('aria-sort'),
                   sorted: heads.filter(head => head.hasAttribute('aria-sort')).length };
        }""",
        heading,
    )


def number(text):
    return float(text.replace(",", "").strip("<>?=")) if text != "–" else None


def test_a_click_sorts_and_another_turns_it_around(visit):
    page = visit()
    before = column(page, "offline win rate")
    assert before["sort"] == "descending"
    assert [number(text) for text in before["texts"]] == sorted(map(number, before["texts"]), reverse=True)
    heading = page.locator(".sortable").first.get_by_role("button", name="queries to target")
    heading.click()
    up = column(page, "queries to target")
    assert (up["sort"], up["sorted"]) == ("ascending", 1)
    assert [number(text) for text in up["texts"]] == sorted(map(number, up["texts"]))
    heading.click()
    down = column(page, "queries to target")
    assert down["sort"] == "descending"
    assert [number(text) for text in down["texts"]] == sorted(map(number, up["texts"]), reverse=True)
    assert page.locator(".board [role=status]").first.text_content() == "Sorted by queries to target, descending."


def test_the_keyboard_sorts_and_what_has_no_figure_comes_last(visit):
    page = visit()
    page.locator(".sortable").first.get_by_role("button", name="rank").focus()
    page.keyboard.press("Enter")
    ranks = [number(text) for text in column(page, "rank")["texts"]]
    assert column(page, "rank")["sort"] == "ascending"
    assert ranks[-1] is None  # rebuilt from notes: not ranked
    assert ranks[0] == 1
    page.keyboard.press("Space")
    assert column(page, "rank")["sort"] == "descending"
    assert [number(text) for text in column(page, "rank")["texts"]][-1] is None
    page.locator(".sortable").first.get_by_role("button", name="agent").focus()
    page.keyboard.press("Enter")
    names = column(page, "agent")["texts"]
    assert column(page, "agent")["sort"] == "ascending"
    assert names == sorted(names, key=str.lower)


def test_the_focus_is_seen(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(6):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; })()"
        )
        assert style == ["solid", "3px"]


def test_the_legend_chooses_who_is_drawn(visit):
    page = visit()
    drawn = "document.querySelectorAll('#synthetic-v0-wins g[data-agent]:not([hidden])').length"
    assert page.evaluate(drawn) == 5  # the best four, and those that every comparison has
    box = page.locator(".choices input:checked").first
    box.focus()
    page.keyboard.press("Space")
    assert page.evaluate(drawn) == 4
    page.get_by_role("button", name="all", exact=True).first.click()
    assert page.evaluate(drawn) == 12
    page.get_by_role("button", name="none").first.click()
    assert page.evaluate(drawn) == 0
    page.get_by_role("button", name="the first choice").first.click()
    assert page.evaluate(drawn) == 5
    heights = page.evaluate(
        "[...document.querySelectorAll('#synthetic-v0-wins .marks:not([hidden]) .end')]"
        ".map(end => end.getBoundingClientRect().top)"
    )
    gaps = [below - above for above, below in itertools.pairwise(sorted(heights))]
    assert min(gaps) > 11  # no two names of lines lie on each other


def test_what_runs_say_is_read_and_never_run(visit):
    page = visit()
    page.evaluate(OPEN_ALL)
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".duel").filter(has_text="<script>window.hacked").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(visit, scheme):
    page = visit(PHONE, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)"
    )  # wide tables scroll in their box
    page.evaluate("document.querySelector('.scroll').scrollLeft = 200")
    assert page.evaluate("document.querySelector('.sortable tbody th').getBoundingClientRect().left") < 30
    contrast = page.evaluate(CONTRAST)
    assert len(contrast) > 20
    assert {name: ratio for name, ratio in contrast.items() if ratio < 4.5} == {}


def test_light_and_dark_follow_the_reader(visit):
    colours = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRAST)
        assert not [name for name, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5]
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_it_is_made_for_ears_too(visit):
    page = visit()
    page.evaluate(OPEN_ALL)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6,button,a,summary')].every(e => e.textContent.trim())"
    )
    assert page.evaluate("[...document.querySelectorAll('input')].every(i => i.labels.length === 1)")
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(s => s.tabIndex === 0)")
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("[...document.querySelectorAll('th')].every(th => th.scope)")
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))")


def test_a_link_to_an_agent_opens_its_runs(visit):
    page = visit()
    details = page.locator("#synthetic-v0-a0")
    assert details.get_attribute("open") is None
    page.locator(".sortable tbody th a").first.click()
    page.wait_for_function("document.querySelector('#synthetic-v0-a0').open")


def test_it_prints(visit, tmp_path):
    page = visit({"width": 1030, "height": 700})
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1030
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_it_says_so_where_there_is_no_browser():
    assert "apt-get install chromium" in MISSING
    assert os.path.isabs(CHROMIUM)
