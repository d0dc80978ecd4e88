"""A stranger's agent enters the leaderboard by one command: from a file, and from a package of its own."""

import ast
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from benchmark_helpers import WORLD, config, silent

from llm_duel_env import cli
from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.entering import entry_of
from llm_duel_env.benchmark.rerun import CannotReplay, replay
from llm_duel_env.benchmark.results import find_results
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.stored import keep
from llm_duel_env.benchmark.suite import load_suite
from llm_duel_env.options import Enter, Leaderboard, Submit

PACKAGE = Path(__file__).parents[2] / "examples" / "their_agent"
SUITE = {
    "name": "small",
    "entries": [
        {
            **{"env": "duel/Synthetic-v0", "env_kwargs": WORLD, "agents": ["uniform", "online_dpo"], "seeds": 2},
            **{"budget": 60, "batch": 8, "eval_every": 0.5, "eval_prompts": 24},
        }
    ],
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A fresh folder with the stranger's file and a small suite, where we stand."""
    shutil.copy(PACKAGE / "their_agent.py", tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SUITE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of_code(path):
    """Lines that are neither blank nor comments nor docstrings."""
    text = path.read_text()
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docs for n, line in lines)


def test_the_stranger_s_agent_is_short():
    assert lines_of_code(PACKAGE / "their_agent.py") < 30


@pytest.mark.slow
def test_one_command_from_a_file_to_the_table(elsewhere, capsys):
    assert cli.carry_out(Enter("their_agent.py:MarginDuelist", "small.yaml", jobs=1)) == 0
    out = capsys.readouterr().out
    assert "4 of 4 runs are over" in out
    assert "MarginDuelist" in out
    assert "online_dpo" in out
    assert (elsewhere / "runs" / "small-entry" / "report" / "leaderboard.md").is_file()
    results, _ = find_results(["runs"])
    mine = next(r for r in results if r["label"] == "MarginDuelist")
    assert mine["agent_config"]["policy"]["learning_rate"] == 0.03
    assert mine["agent_source"]["class"].endswith(":MarginDuelist")
    assert replay(mine, 3).equal  # one's own file; somebody else's archive must not name one
    with pytest.raises(CannotReplay, match="is a file of its author's"):
        replay({**mine, "archive": "theirs.zip"}, 3)
    assert cli.carry_out(Submit((Path("runs"),), Path("mine.zip"), by="A. Person", description="mine")) == 0
    assert "others cannot replay it unless it is a package" in capsys.readouterr().err
    assert cli.carry_out(Leaderboard((Path("mine.zip"),))) == 0  # and its file is not needed to read it


def test_kept_results_stand_for_agents_that_are_not_played(elsewhere):
    runs = [run for run in load_suite("small.yaml", "played") if run.label == "online_dpo"]
    for told in runs:
        run(told, say=silent)
    keep(runs, "kept")
    told = Enter("their_agent.py:MarginDuelist", "small.yaml", results=Path("kept"))
    entry = entry_of(told)
    assert [run.label for run in entry.runs] == ["MarginDuelist"] * 2
    assert len(entry.kept) == 2
    both = entry_of(Enter("their_agent.py:MarginDuelist", "small.yaml", against=("online_dpo", "uniform")))
    assert [(run.label, run.seed) for run in both.runs] == [
        (label, seed) for label in ("MarginDuelist", "online_dpo", "uniform") for seed in (0, 1)
    ]
    assert all(run.env_kwargs == WORLD and run.budget == 60 for run in both.runs)
    with pytest.raises(ValueError, match="other agents beside uniform"):
        entry_of(Enter("uniform", "small.yaml", against=("uniform",)))


def test_an_agent_in_a_file_is_asked_for_by_class(elsewhere):
    found = registry.load_agent("their_agent.py:MarginDuelist")
    assert found.__name__ == "MarginDuelist"
    assert found is registry.load_agent(f"{elsewhere}/their_agent.py:MarginDuelist")
    settings = found.configure({"policy.batch": 64})
    assert (settings.policy.batch, settings.policy.learning_rate) == (64, 0.03)  # its own default stays
    for name, said in (
        ("nothing.py:MarginDuelist", "no file"),
        ("their_agent.py:Nobody", "a class 'Nobody'"),
        ("their_agent.py:direct_optimizer", "that is an Agent"),
    ):
        with pytest.raises(ValueError, match=said):
            registry.load_agent(name)


def test_an_agent_in_a_file_is_run_under_its_class_name(elsewhere, capsys):
    told = ["run", "--agent", "their_agent.py:MarginDuelist", "--env", "duel/Synthetic-v0", "--budget", "16"]
    small = [f"task_kwargs.{name}={value}" for name, value in WORLD["task_kwargs"].items()]
    with pytest.raises(SystemExit) as end:
        cli.main([*told, "--batch", "8", "--eval-every", "1", "--env-set", *small])
    assert end.value.code == 0
    assert (elsewhere / "runs" / "Synthetic-v0" / "MarginDuelist" / "seed-0" / "result.json").is_file()
    capsys.readouterr()


@pytest.mark.slow
def test_an_installed_package_enters_by_its_name(elsewhere):
    """As its author does it: pip install -e in an environment of its own, which sees this one's packages."""
    pytest.importorskip("pip")
    shutil.copytree(PACKAGE, elsewhere / "package")
    venv.create(elsewhere / "venv", with_pip=False, symlinks=True)
    python = elsewhere / "venv" / "bin" / "python"
    (purelib,) = (elsewhere / "venv" / "lib").glob("python3.*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
    (purelib / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}

    def say(*command):
        done = subprocess.run(
            [str(python), "-m", *command], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    say("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "package")
    assert "margin_duelist" in say("llm_duel_env.cli", "list", "agents")
    out = say("llm_duel_env.cli", "enter", "margin_duelist", "--suite", "small.yaml", "--jobs", "1")
    assert "margin_duelist" in out
    assert "online_dpo" in out
    result = next(r for r in find_results([elsewhere / "runs"])[0] if r["label"] == "margin_duelist")
    assert result["agent_source"]["package"] == "their-agent 0.1.0"


def test_an_agent_that_is_not_installed_cannot_be_replayed(tmp_path):
    result = run(config(tmp_path / "run", budget=16), say=silent)
    with pytest.raises(CannotReplay, match="agent margin_duelist is not installed"):
        replay({**result, "agent": "margin_duelist", "folder": str(tmp_path / "run")}, 2)
