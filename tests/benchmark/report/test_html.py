"""The HTML report: what it says, that nothing in it comes unescaped from a run, and the geometry of its charts."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_world import EVIL, result, sample

from llm_duel_env import cli
from llm_duel_env.benchmark import leaderboard
from llm_duel_env.benchmark.report import (
    html,
    html_bars,
    html_charts,
    html_curves,
    html_runs,
    html_styles,
    html_table,
    table,
)
from llm_duel_env.benchmark.samples import Sample


class Tags(HTMLParser):
    """The tags, ids and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.ids = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def text(report):
    return Path(report).read_text()


@pytest.fixture(scope="module")
def tags(text):
    return Tags(text)


def test_nothing_of_a_run_becomes_markup(text, tags):
    assert EVIL in "".join(tags.texts)  # it is there to be read
    assert "<script>window" not in text
    assert tags.tags.count("script") == 1
    assert "img" not in tags.tags
    assert not [name for _, name, _ in tags.attributes if name.startswith("on")]
    assert "--html &lt;x&gt;" in text


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(text, tags):
    for tag, name, value in tags.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in policy or f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_is_well_made(tags):
    assert len(set(tags.ids)) == len(tags.ids)
    linked = {value[1:] for _, name, value in tags.attributes if name == "href" and value.startswith("#")}
    assert linked <= set(tags.ids)
    named = {value for _, name, value in tags.attributes if name in ("aria-labelledby", "aria-describedby")}
    assert named <= set(tags.ids)
    assert tags.tags.count("h1") == 1


def test_the_same_runs_make_the_same_page(made, report):
    assert html.page(made, "llm-duel leaderboard runs --html <x>") == Path(report).read_text()


def test_what_is_compared_is_told(made, text):
    assert {one.asks for one in made} == {("scores",), ()}
    assert text.index("12 agents on duel/Synthetic-v0.") < text.index("is told scores besides")
    for words in (
        "everybody&#39;s budget is 100 queries",
        "Bernoulli feedback",
        "24 held-out prompts",
        "10 seeds;",
    ):
        assert words in text


def test_every_figure_has_its_interval_and_n(made):
    (board,) = [one for one in made if len(one.rows) == 12]
    columns, lines = html_table.lines(board)
    headings = [column.heading for column in columns]
    assert {"offline win rate", "less online_dpo", "queries to target", "cumulative regret", "KL"} <= set(headings)
    assert "tokens" not in headings  # nobody knows it
    plain_headings, plain_rows = table.cells(board)
    shared = {"offline win rate": "offline win rate", "curve mean": "curve mean", "KL": "KL (nats)"}
    for line, plain in zip(lines, plain_rows):
        assert line.seeds == 10
        for heading, cell in zip(headings, line.cells):
            assert cell.interval or cell.text in ("–", ">100"), (line.label, heading)
            if heading in shared:
                assert plain[plain_headings.index(shared[heading])].startswith(cell.text)
    orders = [line.cells[headings.index("offline win rate")].order for line in lines]
    assert orders == sorted(orders, reverse=True)
    assert {"reconstructed", "ours"} <= {mark for line in lines for mark in line.marks}


def test_few_seeds_get_no_interval_over_them(made):
    (few,) = [one for one in made if one.kind == "text"]
    _, (line,) = html_table.lines(few)
    assert line.seeds == 2
    assert not any(cell.interval for cell in line.cells)
    assert html_curves.performance_profiles(few) is None
    assert "smallest to largest seed" in html_curves.learning_curves(few).about
    (one,) = leaderboard.tables([result("online_dpo", 0, 0.9)])
    _, (line,) = html_table.lines(one)
    assert any("over prompts" in cell.interval for cell in line.cells)


def test_censored_bars_are_bounds_and_say_so(made):
    (board,) = [one for one in made if len(one.rows) == 12]
    bars = {bar.label: bar for bar in html_bars.target_bars(board).bars}
    assert bars["uniform"].text == ">100, n = 10"
    assert bars["uniform"].at == 100
    assert bars["uniform"].censored == "10 of 10 seeds never got there"
    assert not bars["sea"].censored
    assert bars["sea"].low <= bars["sea"].at <= bars["sea"].high
    assert [bar.at for bar in bars.values()] == sorted(bar.at for bar in bars.values())
    differences = html_bars.difference_bars(board)
    sea = next(bar for bar in differences.bars if bar.label == "sea")
    assert sea.low > differences.zero  # it ends above online DPO
    assert html_bars.target_bars(leaderboard.tables([result("sea", 0, 0.9)])[0]) is None
    assert html_bars.difference_bars(leaderboard.tables([result("sea", 0, 0.9)])[0]) is None


def test_a_chart_is_where_its_numbers_are():
    x = np.array([0.0, 50.0, 100.0])
    series = html_charts.Series("a", x, np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 0.9]), np.array([0.1, 0.6, 1.0]))
    told = {"name": "n", "title": "t", "about": "a", "x_label": "x", "y_label": "y"}
    chart = html_charts.line_chart([series], y_range=(0, 1), guides=[(0.25, "low")], **told)
    (line,) = chart.lines
    assert line.path == "M0 1000L500 500 1000 0"
    assert line.band == "M0 900L500 400 1000 0 1000 100 500 600 0 1000Z"
    assert line.marks[-1] == (100, 100)
    assert [(guide.place, guide.text) for guide in chart.guides] == [(25, "low")]
    assert [tick.text for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [tick.place for tick in chart.x_ticks] == [0, 20, 40, 60, 80, 100]
    with pytest.raises(ValueError, match="at least one line"):
        html_charts.line_chart([], **told)
    long = html_charts.Series("b", np.arange(5000.0), np.arange(5000.0))
    assert len(html_charts.line_chart([long], **told).lines[0].path.split()) < 120
    assert [tick.text for tick in html_charts.ticks(0.5, 0.95)][:3] == ["0.5", "0.6", "0.7"]
    assert [tick.text for tick in html_charts.ticks(0.0, 6.0, 5)] == ["0.0", "1.5", "3.0", "4.5", "6.0"]


def test_regret_far_above_the_rest_is_cut_off_and_named():
    runs = [result(f"a{i}", seed, 0.9) for i in range(9) for seed in range(10)]
    curve = result("x", 0, 0.9)["curve"]
    steep = {**curve, "cumulative_regret": [value * 1000 for value in curve["cumulative_regret"]]}
    runs += [result("steep", seed, 0.8, curve=steep) for seed in range(10)]
    (one,) = leaderboard.tables(runs)
    assert "Cut off at the top, with where they end: steep (30,000)" in html_curves.regret_curves(one).about
    (calm,) = leaderboard.tables(runs[:-10])
    assert "Cut off" not in html_curves.regret_curves(calm).about


def test_what_is_promised_is_drawn_against_what_is_kept():
    runs = []
    for seed in range(2):
        run = result("proxy", seed, 0.8)
        run["curve"]["true_win_rate"] = [0.5] * len(run["curve"]["queries"])
        runs += [run, result("plain", seed, 0.8)]
    (one,) = leaderboard.tables(runs)
    (chart,) = [chart for chart in html_curves.charts(one) if chart.name == "over-oracle"]
    assert [line.label for line in chart.lines] == ["proxy"]  # the other knows no truth
    assert chart.diagonal
    assert [tick.place for tick in chart.x_ticks] == [tick.place for tick in chart.y_ticks]
    assert all(bottom < left for left, bottom in chart.lines[0].marks[1:])  # below the diagonal
    (plain,) = leaderboard.tables(runs[1::2])
    assert not [chart for chart in html_curves.charts(plain) if chart.diagonal]


def test_lines_are_told_apart_and_keep_their_look():
    labels = ["sea", "online_dpo", "offline_dpo", "uniform", *(f"agent {i}" for i in range(20))]
    looks = html_styles.looks_of([labels, ["agent 5", "new", "sea"], labels[::-1]])
    assert len(set(looks.values())) == len(labels) + 1
    assert len({looks[label].colour for label in ("agent 5", "new", "sea")}) == 3  # in a small table by colour alone
    assert {looks[label].colour for label in labels[:4]} == {0, 1, 2, 7}
    assert len({looks[label].colour for label in labels[:8]}) == 8  # the first eight by colour alone
    shown = [label for label, style in html_styles.styles(labels, looks).items() if style.shown]
    assert shown == ["sea", "online_dpo", "offline_dpo", "uniform"]
    assert all(style.shown for style in html_styles.styles(labels[:5], looks).values())


def test_sample_duels_are_read_out(text):
    assert "The oracle preferred the first." in text
    assert "P(first beats second) = 0.81, its members’ spread 0.12" in text
    assert "Thompson winner of member 7" in text
    assert "the agent gives no reason." in text
    assert "[3000 characters]" in text
    assert "3 more are in the run’s samples.jsonl" in text
    assert text.count('<article class="duel">') == (12 * 2 + 2 + 1) * html_runs.SAMPLES


def test_verdicts():
    told = [
        html_runs.verdict(Sample(**sample(**changes)))
        for changes in (
            {"first_wins": 0.0},
            {"first_wins": 0.5},
            {"first_wins": 1.0, "labelled_by": "agent"},
            {"first_wins": None, "labelled_by": "nobody"},
            {"first_wins": 0.5, "same": True},
        )
    ]
    assert told == [
        "The oracle preferred the second.",
        "The oracle called it a tie.",
        "The agent itself, at no cost, preferred the first.",
        "Left out: nobody was asked.",
        "The same response twice: a tie by definition, not paid for.",
    ]


def test_a_run_tells_what_it_takes_to_play_it_again(made, text):
    assert "llm-duel run --resume x" in text
    assert "ab" * 32 in text
    (one,) = leaderboard.tables([result("online_dpo", 3, 0.9, agent_config={"policy": {"batch": 8}, "beta": 0.1})])
    (section,) = html_runs.sections(one)
    facts = dict(section.runs[0].facts)
    assert facts["command"].startswith("llm-duel run --agent online_dpo --env duel/Synthetic-v0 --seed 3 --budget 100")
    assert "--set policy.learning_rate=0.01" in facts["command"]
    assert facts["command"].endswith("(made from the result)")
    assert facts["versions"] == "not kept with this result"
    assert facts["seconds by kind of work"] == "act 1.5"
    assert section.settings == [("policy.batch", "8"), ("beta", "0.1")]
    assert section.changed == [("policy.learning_rate", "0.01")]


def test_checked_entries_are_marked():
    replay = {"rounds": 20, "rounds_equal": 20, "evaluations": 0, "evaluations_equal": 0, "equal": True}
    (one,) = leaderboard.tables([result("sea", 0, 0.9, replay=replay), result("uniform", 0, 0.5)])
    marks = {line.label: line.marks for line in html_table.lines(one)[1]}
    assert marks == {"sea": ["replayed: 20 rounds, 1 of 1 seeds"], "uniform": ["self-reported"]}


def test_the_command_writes_it(tmp_path, made, capsys):
    from report_world import world

    runs = world(tmp_path / "runs", seeds=1)
    assert cli.carry_out(cli.Leaderboard((runs,), html=tmp_path / "deep" / "report.html")) == 0
    written = (tmp_path / "deep" / "report.html").read_text()
    assert f"llm-duel leaderboard {runs} --html {tmp_path / 'deep' / 'report.html'}" in written
    assert str(tmp_path / "deep" / "report.html") in capsys.readouterr().out


def test_a_text_that_is_no_text_does_not_end_the_report(tmp_path, monkeypatch):
    (one,) = leaderboard.tables([result("sea", 0, 0.9, status="half a pair: \ud800")])
    assert "half a pair: ?" in html.write([one], tmp_path / "x.html", "c").read_text()


@pytest.mark.slow
def test_the_size_stays_reasonable(tmp_path):
    runs = [result(f"agent_{i}", seed, 0.9) for i in range(24) for seed in range(10)]
    grid = np.arange(101)
    for run in runs:
        places = run["curve"]["queries"]
        run["curve"] = {name: np.interp(grid, places, values).tolist() for name, values in run["curve"].items()}
    assert html.write(leaderboard.tables(runs), tmp_path / "x.html", "c").stat().st_size < 3e6
