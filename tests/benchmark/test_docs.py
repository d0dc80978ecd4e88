"""The generated documentation: complete, explained, and as it is committed."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from llm_duel_env.benchmark.docs import fields, logged, pages, tree
from llm_duel_env.benchmark.docs.explanations import METRICS, explain
from llm_duel_env.benchmark.registry import load_agent

ROOT = Path(__file__).parents[2]
AGENTS = pages.our_agents()


@pytest.fixture(scope="module")
def files():
    return tree.generated(ROOT, play_text=False)


def test_the_committed_files_are_what_the_generator_makes(files):
    stale = [str(path.relative_to(ROOT)) for path, text in files.items() if path.read_text() != text]
    assert not stale, f"run `make docs` and commit: {stale}"


def test_every_agent_has_its_page_its_row_and_its_name_in_the_readme(files):
    readme, table = (ROOT / "README.md").read_text(), (ROOT / "docs/agents.md").read_text()
    pages_there = {path.stem for path in (ROOT / "docs/agents").glob("*.md")}
    assert pages_there == set(AGENTS)
    assert all(f"[`{name}`](docs/agents/{name}.md)" in readme for name in AGENTS)
    assert all(f"| [`{name}`](agents/{name}.md)" in table for name in AGENTS)


@pytest.mark.parametrize("name", AGENTS)
def test_a_page_has_every_setting_and_explains_what_is_logged(name, files):
    text = files[tree.agent_path(ROOT, name)]
    agent = load_agent(name)
    for setting in fields.fields_of(agent.configure({})):
        played = agent.policy_plays or not setting.name.startswith("policy.")
        assert (f"| `{setting.name}` |" in text) == played
    assert ("play no part: another model" in text) == (not agent.policy_plays)
    refused = text.partition("Refused where they are not the default: ")[2].partition(".\n")[0]
    assert refused == ", ".join(f"`policy.{setting}`" for setting in agent.policy_fixed)
    told = tree.metrics_of(name, tree.agent_path(ROOT, name), play_text=False)
    assert {"kl", "entropy"} <= told <= set(METRICS)
    assert all(METRICS[metric].replace("|", "\\|") in text for metric in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AGENTS if logged.TEXT in logged.envs_of(name)])
def test_what_an_agent_logs_on_text_is_on_its_page(name):
    page = tree.agent_path(ROOT, name)
    assert logged.logged(name, logged.TEXT) == tree.metrics_of(name, page, play_text=False)


def test_a_metric_that_nobody_explained_is_refused():
    with pytest.raises(KeyError, match="add one to"):
        explain("a_metric_of_tomorrow")


@dataclass(frozen=True)
class Base:
    """Of a test."""

    rate: float = 0.1
    """The first
    docstring."""
    size: int = 3
    """Its size."""


@dataclass(frozen=True)
class Derived(Base):
    """Of a test."""

    rate: float = 0.2
    """The second docstring."""
    part: Base = Base()
    """A part."""
    bare: int = 0


def test_fields_take_the_nearest_docstring_and_parts_follow():
    found = fields.fields_of(Base())
    assert [(f.name, f.default, f.told) for f in found] == [
        ("rate", 0.1, "The first docstring."),
        ("size", 3, "Its size."),
    ]
    assert fields.docstrings(Derived)["rate"] == "The second docstring."
    with pytest.raises(ValueError, match=r"Derived\.bare has no docstring"):
        fields.fields_of(Derived())


def test_the_readme_needs_its_marks():
    with pytest.raises(ValueError, match=r"README\.md: expected the marks"):
        tree.with_agents("# A README without marks", ["a line"], "README.md")
