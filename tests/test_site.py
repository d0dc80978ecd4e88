"""The documentation site: what pages show runs, each has its place, links lead somewhere, pictures are drawn."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llm_duel_env import cli
from llm_duel_env.benchmark.docs.options import options_of, with_options
from llm_duel_env.oracles.catalogue import KINDS
from llm_duel_env.tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTES = {DOCS / "losses.notes.md", *DOCS.glob("agents/notes/*.md")}
PAGES = sorted(set(DOCS.rglob("*.md")) - NOTES)
MARKED = re.compile(
    r"^<!-- run(?P<slow>: slow)? -->\n```(?P<language>\w+)\n(?P<block>.*?)^```$"
    r"(?:\n\n<!-- shows -->\n```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
RUN = {page: list(MARKED.finditer(page.read_text())) for page in PAGES}


def script(name):
    """A module of docs/site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = script("hooks")


def command(line):
    """Carries out one line of a shell, in the present folder; what it prints beyond this process's output."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "llm-duel":  # in this process: the imports are paid for
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0, line
        return ""
    if program == "make":
        program, arguments = "make", ["--dry-run", "--directory", str(ROOT), *arguments]
    assert program in ("make", "ls", "head"), f"{line}: nobody runs this"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def carry_out(match, capsys):
    """What a marked block prints."""
    capsys.readouterr()
    printed = ""
    if match["language"] == "python":
        exec(compile(match["block"], "a page", "exec"), {"__name__": "__main__"})
    else:
        assert match["language"] == "bash"
        for line in match["block"].replace("\\\n", " ").splitlines():
            printed += command(line)
    return printed + capsys.readouterr().out


def alike(line):
    """A line without its numbers and blanks, which may differ from machine to machine."""
    return " ".join(re.sub(r"\d+(?:\.\d+)?", "#", line).split())


def play(page, capsys, slow):
    for match in RUN[page]:
        if match["slow"] and not slow:
            continue
        printed = {alike(line) for line in carry_out(match, capsys).splitlines()}
        missing = [line for line in (match["shown"] or "").splitlines() if alike(line) not in printed]
        assert not missing, f"{page}: shown, but not printed: {missing}\n{printed}"


def named(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [p for p, found in RUN.items() if any(not m["slow"] for m in found)], ids=named)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    play(page, capsys, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p, found in RUN.items() if any(m["slow"] for m in found)], ids=named)
def test_what_takes_longer_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    play(page, capsys, slow=True)


def test_marks_are_understood():
    for page in PAGES:
        text = page.read_text()
        assert len(RUN[page]) == text.count("<!-- run"), f"{page}: a mark without a block"
        assert sum(m["shown"] is not None for m in RUN[page]) == text.count("<!-- shows -->"), page
    assert len(RUN[DOCS / "start.md"]) >= 6


def pages_of(nav):
    for entry in nav:
        if isinstance(entry, dict):
            for to in entry.values():
                yield from [to] if isinstance(to, str) else pages_of(to)
        else:
            yield entry


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = list(pages_of(hooks.expanded(config["nav"], DOCS)))
    assert len(found) == len(set(found))
    missing = {named(page) for page in PAGES} - set(found)
    assert not missing, f"add to nav in mkdocs.yml: {missing}"
    unknown = set(found) - {named(page) for page in PAGES} - set(hooks.PAGES.values())
    assert not unknown, f"in nav of mkdocs.yml, and not there: {unknown}"
    assert all((ROOT / source).exists() for source in hooks.PAGES)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


def outside_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_fences(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", outside_fences(file.read_text()), re.MULTILINE)
            if anchor not in {slug(heading) for heading in headings}:
                broken.append(target)
    assert not broken


def test_one_text_serves_github_and_the_site():
    text = "See [it](../examples/my_task.py), [the board](../benchmark.md#a), [here](tasks.md).\n\n"
    text += "[examples/my_oracle.py](../examples/my_oracle.py)\n\n[types](../llm_duel_env/types.py)\n\n"
    text += "```python\n[x](../benchmark.md)\n```\n"
    made = hooks.for_site(text, "docs/add.md", "add.md")
    assert made.startswith("See it, [the board](benchmark.md#a), [here](tasks.md).\n")
    assert (ROOT / "examples/my_oracle.py").read_text() in made
    assert '```python title="examples/my_oracle.py"' in made
    assert "\n::: llm_duel_env.types\n" in made
    assert made.endswith("```python\n[x](../benchmark.md)\n```\n")
    assert hooks.link("up", "../../README.md", "docs/tasks/x.md", "tasks/x.md") == "[up](../index.md)"
    assert hooks.link("log", "docs/status.md", "CONTRIBUTING.md", "contributing.md") == "[log](status.md)"


def test_a_link_to_no_file_is_told(caplog):
    hooks.link("gone", "../examples/gone.py", "docs/x.md", "x.md")
    assert "docs/x.md: link to examples/gone.py, and there is no such file" in caplog.text


def test_every_task_and_every_oracle_has_a_page_with_its_options():
    oracles = [where for where, _ in KINDS.values()]
    oracles += ["llm_duel_env.oracles.utility:UtilityOracle", "llm_duel_env.oracles.matrix:MatrixOracle"]
    texts = [page.read_text() for page in PAGES]
    for where in [*TASKS.values(), *oracles, "llm_duel_env.envs.core:DuelCore"]:
        assert sum(f"<!-- options of {where}: made by" in text for text in texts) == 1, where


@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- options of" in p.read_text()], ids=named)
def test_the_options_on_a_page_are_the_codes(page):
    text = page.read_text()
    assert with_options(text) == text, "run `make docs` and commit"
    assert "| `" in text.partition("<!-- options of")[2]


class Documented:
    """Made.

    Args:
        size: how large.
    """

    def __init__(self, size=3, colour="red"):
        pass


def test_an_option_that_nobody_explained_is_refused():
    with pytest.raises(ValueError, match="its argument 'colour' is not explained"):
        options_of(Documented)
    with pytest.raises(ValueError, match="each with its end"):
        with_options("<!-- options of a:B: made by `make docs` -->\n")


def test_an_explanation_of_no_option_is_refused():
    def made(size: int) -> None:
        """Made.

        Args:
            size: how large.
            weight: how heavy.
        """

    with pytest.raises(ValueError, match=r"explains \['weight'\]"):
        options_of(made)


@pytest.mark.parametrize("name", ["loop", "choice", "feedback", "counting", "favicon"])
def test_pictures_are_what_their_script_draws(name):
    pictures = script("pictures")
    assert set(pictures.PICTURES) == {path.stem for path in (DOCS / "images").glob("*.svg")}
    assert pictures.PICTURES[name]() == (DOCS / "images" / f"{name}.svg").read_text()


def test_examples_in_docstrings_become_code():
    pytest.importorskip("griffe", reason="the extra docs")
    fenced = script("doctests").fenced
    assert fenced("A.\n\n>>> 1 + 1\n2\n") == "A.\n\n```pycon\n>>> 1 + 1\n2\n```\n"
    assert fenced("Example:\n    >>> f()\n    3") == "Example:\n    ```pycon\n    >>> f()\n    3\n    ```"


def test_what_a_page_would_fetch_from_elsewhere_is_found():
    assert not hooks.fetched('<a href="https://arxiv.org/abs/1">paper</a> <img alt="x" src="images/a.svg">')
    assert not hooks.fetched('<link href="https://docs.example/" rel=canonical> <script src="assets/a.js">')
    for tag in ('<script async src="https://cdn.example/a.js">', "<link rel=stylesheet href=//fonts.example/a.css>"):
        assert hooks.fetched(f"<p>{tag}</p>") == [tag]
