"""The report of a world made by hand, once for all tests of a worker."""

import pytest
from report_world import world

from llm_duel_env.benchmark.leaderboard import tables
from llm_duel_env.benchmark.report import html
from llm_duel_env.benchmark.results import find_results


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The tables of the world."""
    return tables(find_results([world(tmp_path_factory.mktemp("runs"))])[0])


@pytest.fixture(scope="session")
def report(made, tmp_path_factory):
    """The path of their report."""
    return html.write(made, tmp_path_factory.mktemp("report") / "report.html", "llm-duel leaderboard runs --html <x>")
