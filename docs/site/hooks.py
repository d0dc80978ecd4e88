"""What MkDocs is told beyond mkdocs.yml: pages that lie outside `docs/`, and links that work on GitHub and on the site.

Documents are written for both. A link to a file of the repository stays a link on GitHub. On the site

- a link to a document that is a page here (`PAGES`) leads to that page;
- a link to an example, alone in its paragraph, is followed by the example itself;
- a link to a module of the package, alone in its paragraph, becomes the reference made of its docstrings;
- any other link to a file becomes its name.

A page that would fetch anything from elsewhere is told, which a strict build takes for an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmark.md": "benchmark.md",
    "llm_duel_env/assets/README.md": "models.md",
}
"""Documents outside `docs/` -> their pages."""
HOME = "README.md"
"""Leads to the front page."""
WIDE = {"benchmark.md", "agents.md"}
"""Pages of wide tables, which go without a table of contents beside them."""
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)")
ALONE = re.compile(r"^\[[^\]]*\]\(([^)\s]+)\)$")
ELSEWHERE = re.compile(r"^(?:[a-z]+:|#|/)")
FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
FETCHED = re.compile(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
"""What a browser would fetch from elsewhere; a canonical address is only told."""
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json"}

log = logging.getLogger("mkdocs.hooks.links")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in what the navigation leaves open: ``folder/*`` stands for every page of a folder, by name."""
    config.nav = expanded(config.nav, Path(config.docs_dir))
    return config


def expanded(nav: list[Any], docs: Path) -> list[Any]:
    """A navigation with the pages of each ``folder/*`` in its place; a list in a list, by its heading in a dict."""
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            found.append({name: expanded(to, docs) if isinstance(to, list) else to for name, to in entry.items()})
        elif entry.endswith("/*"):
            found += [{heading(page): str(page.relative_to(docs))} for page in sorted(docs.glob(f"{entry}.md"))]
        else:
            found.append(entry)
    return found


def heading(page: Path) -> str:
    """The first heading of a page, without marks."""
    return next(line for line in page.read_text().splitlines() if line.startswith("# "))[2:].replace("`", "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents that lie outside `docs/`."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them."""
    name = page.file.src_uri
    if name in WIDE:
        page.meta["hide"] = ["toc"]
    source = next((where for where, uri in PAGES.items() if uri == name), f"docs/{name}")
    return for_site(markdown, source, name)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The page as it is, with a warning where reading it would need a network."""
    for tag in fetched(output):
        log.warning("%s: fetched from elsewhere: %s", page.file.src_uri, tag)
    return output


def fetched(html: str) -> list[str]:
    """The tags of a page that make a browser fetch something from another host."""
    return [tag for tag in FETCHED.findall(html) if "canonical" not in tag]


def for_site(markdown: str, source: str, page: str) -> str:
    """A document as the site needs it; what is fenced stays as it is.

    Args:
        markdown: the document.
        source: where it lies in the repository.
        page: its page, relative to `docs/`.
    """
    lines, fence = [], ""
    for line in markdown.splitlines():
        if mark := FENCE.match(line):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
            lines.append(line)
        elif fence:
            lines.append(line)
        elif (alone := ALONE.match(line)) and (path := in_repository(alone[1], source)):
            lines += shown(path, line, source, page)
        else:
            lines.append(LINK.sub(lambda match: link(match[1], match[2], source, page), line))
    return "\n".join(lines) + "\n"


def shown(path: str, line: str, source: str, page: str) -> list[str]:
    """What stands for a link that is alone in its paragraph."""
    if path.startswith("examples/") and (ROOT / path).is_file():
        file = ROOT / path
        return [f'```{LANGUAGES[file.suffix]} title="{path}"', *file.read_text().rstrip("\n").splitlines(), "```"]
    if path.startswith("llm_duel_env/") and path.endswith(".py") and (ROOT / path).is_file():
        return [f"::: {path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"]
    return [LINK.sub(lambda match: link(match[1], match[2], source, page), line)]


def link(text: str, target: str, source: str, page: str) -> str:
    """A link as the site needs it: as it is within `docs/`, to a page that stands for the file, or the text alone."""
    path = in_repository(target, source)
    if path is None:
        return f"[{text}]({target})"
    anchor = "#" + target.partition("#")[2] if "#" in target else ""
    to = "index.md" if path == HOME else PAGES.get(path)
    if to is None and path.startswith("docs/"):
        to = path.removeprefix("docs/")
    if to is not None:
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / path).exists():
        log.warning("%s: link to %s, and there is no such file", source, path)
    return text


def in_repository(target: str, source: str) -> str | None:
    """The path, from the top of the repository, that a link in the document `source` leads to; None for addresses and
    for links within the page."""
    if ELSEWHERE.match(target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))
