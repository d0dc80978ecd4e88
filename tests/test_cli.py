"""The command line: what it teaches, what it refuses, and one run from beginning to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_duel_env import cli
from llm_duel_env.benchmark import suite
from llm_duel_env.benchmark.listings import suites
from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent
from llm_duel_env.benchmark.run_config import list_envs
from llm_duel_env.benchmark.suite import list_suites, load_suite

SMALL = ["--env-set", "task_kwargs.candidates=6", "task_kwargs.train_prompts=40", "task_kwargs.heldout_prompts=24"]
TEXT = ["task_kwargs.model=m", "task_kwargs.prompts=p.jsonl", "task_kwargs.oracle=reward_model:/no/model"]
TO_RUN = ["run", "--agent", "sea", "--env", "duel/Synthetic-v0"]
SINGLE = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def command(*arguments):
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


def loaded_by(*arguments):
    """Heavy packages that a command imports in a process of its own."""
    probe = (
        "import atexit, sys; from llm_duel_env.cli import main;"
        "atexit.register(lambda: print(*sorted({'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules))));"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=SINGLE, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help")])
def test_help_waits_for_no_heavy_package(arguments):
    assert not loaded_by(*arguments)


def test_the_list_of_agents_does_without_transformers():
    assert loaded_by("list", "agents") & {"torch", "transformers"} == {"torch"}


def test_help_teaches(capsys):
    assert command("--help") == 0
    text = capsys.readouterr().out
    for line in ("llm-duel demo", "llm-duel run --agent sea --env duel/Synthetic-v0", "--resume", "leaderboard"):
        assert line in text
    assert command("run", "--help") == 0
    text = capsys.readouterr().out
    assert "policy.learning_rate=1e-4" in text
    assert "--no-recipe" in text
    assert "(default 0)" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "--agent and --env"),
        (["run", "--agent", "see", "--env", "duel/Synthetic-v0"], "Did you mean 'sea'"),
        (["run", "--agent", "sea", "--env", "duel/Syntetic-v0"], "Did you mean 'duel/Synthetic-v0'"),
        (["run", "--agent", "sea", "--env", "duel/Synthetic-v0", "--set", "candidate=3"], "no field 'candidate'"),
        (["run", "--agent", "sea", "--env", "duel/Synthetic-v0", "--set", "candidates"], "KEY=VALUE"),
        (["run", "--agent", "sea", "--env", "duel/Synthetic-v0", "--budget", "0"], "budget"),
        (["run", "--agent", "sea", "--env", "duel/Synthetic-v0", "--env-set", "colour=1"], "colour"),
        (["run", "--resume", "nowhere"], "no run in nowhere"),
        ([*TO_RUN, "--set", "candidates=3", "--set", "candidates=4"], "candidates is given twice: 3 and 4"),
        ([*TO_RUN, "--env-set", "task_kwargs=3", "task_kwargs.x=1"], "task_kwargs is given the value 3 too"),
        (["run", "--resume", "nowhere", "--no-recipe"], "leave --no-recipe out"),
        (
            ["run", "--agent", "uniform", "--env", "duel/Text-v0", "--env-set", *TEXT],
            "p.jsonl: no such file",  # what is cheap to check comes before any model is loaded
        ),
        (["leaderboard", "/dev/null"], "not a folder"),
        (["bench", "demos"], "Did you mean 'demo'"),
        (["bench", "demo", "--jobs", "0"], "jobs"),
        (["leaderboard", "nowhere"], "not a folder"),
        (["leaderboard"], "at least one folder"),
    ],
)
def test_bad_input_is_answered_before_anything_is_spent(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_run_its_result_and_its_leaderboard(tmp_path, capsys):
    folder = tmp_path / "runs" / "a"
    told = ["--budget", "40", "--batch", "8", "--folder", folder, "--set", "policy.learning_rate=1e-2", *SMALL]
    assert command("run", "--agent", "online_dpo", "--env", "duel/Synthetic-v0", *told, "--eval-prompts", "24") == 0
    out = capsys.readouterr().out
    assert "policy.learning_rate = 0.01 (paper's default: 5e-07)" in out
    assert "finished: 40 queries" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["env_kwargs"] == {"task_kwargs": {"candidates": 6, "train_prompts": 40, "heldout_prompts": 24}}
    assert command("run", "--resume", folder) == 0
    assert "already finished" in capsys.readouterr().out
    assert command("run", "--resume", folder, "--env-set", "task_kwargs.candidates=6") == 0  # as it is
    capsys.readouterr()
    assert command("run", "--resume", folder, "--env-set", "task_kwargs.candidates=7") == 2
    assert "asked for {'task_kwargs': {'candidates': 7, 'train_prompts': 40, 'heldout" in capsys.readouterr().err
    assert command("run", "--resume", folder, "--seed", "9") == 2
    assert "seed: it has 0, asked for 9" in capsys.readouterr().err
    assert command("leaderboard", tmp_path / "runs", "--out", tmp_path / "report") == 0
    assert "online_dpo" in capsys.readouterr().out
    assert (tmp_path / "report" / "win_rate.png").exists()


@pytest.mark.slow
def test_a_suite_from_a_file(tmp_path, capsys):
    suite = tmp_path / "small.yaml"
    kwargs = "{task_kwargs: {candidates: 6, train_prompts: 40, heldout_prompts: 24}}"
    suite.write_text(
        f"name: small\nentries:\n  - env: duel/Synthetic-v0\n    env_kwargs: {kwargs}\n"
        "    agents: [uniform]\n    seeds: 2\n    budget: 24\n    batch: 8\n    eval_prompts: 24\n"
    )
    assert command("bench", suite, "--out", tmp_path / "out", "--jobs", "1") == 0
    assert "2 of 2 runs are over" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("result.json"))) == 2


def test_lists(capsys):
    assert command("list") == 0
    out = capsys.readouterr().out
    for name in ("sea", "duel/Synthetic-v0", "slic", "demo"):
        assert name in out


def test_the_list_of_agents_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command("list", "agents") == 0
    lines = capsys.readouterr().out.splitlines()
    (sea,) = (line for line in lines if line.split()[1:2] == ["sea"])
    assert "arXiv 2411.01493" in sea  # not folded
    assert max(map(len, lines)) <= 80


def test_the_list_of_agents_says_what_each_plays_and_is_told(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert command("list", "agents") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    last = {line.split()[1]: at for at, line in enumerate(lines) if line.startswith("│") and line.split()[1] != "│"}
    assert set(last) == set(list_agents())
    for name, at in last.items():
        agent = load_agent(name)
        told = [", ".join(sorted(agent.kinds)), *([", ".join(sorted(agent.needs))] if agent.needs else [])]
        assert [line.split("│")[4].strip() for line in lines[at : at + len(told)]] == told  # not folded


def test_the_list_of_losses_says_what_each_needs_and_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command("list", "losses") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (rdo,) = (line for line in lines if line.split()[1:2] == ["rdo"])
    assert [cell.strip() for cell in rdo.split("│")[1:-1]] == [
        "rdo",
        "arXiv 2408.09385",
        "reconstructed",
        "reference, scores",
    ]
    (at,) = (k for k, line in enumerate(lines) if line.split()[1:2] == ["dlma"])
    assert "margin_weight=0.2" in lines[at + 1]
    assert "clip=40.0" in lines[at + 2]
    assert "finite tasks and on text" in " ".join(lines)  # whatever the loss; see the test of every direct optimizer


@pytest.mark.parametrize("what", ["agents", "losses", "envs", "suites"])
def test_the_lists_cut_no_name(capsys, monkeypatch, what):
    monkeypatch.setenv("COLUMNS", "60")
    names = {"agents": list_agents, "losses": list_losses, "envs": list_envs, "suites": list_suites}[what]()
    assert command("list", what) == 0
    listed = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert set(names) <= listed


def test_suites_are_counted_without_being_built(monkeypatch):
    wanted = [
        [name, len(runs), sum(r.budget for r in runs)] for name in list_suites() if (runs := load_suite(name, ""))
    ]
    monkeypatch.setattr(suite, "check", None)
    cells = [column.cells for column in suites().columns]
    assert [[name, int(runs), int(queries)] for name, runs, queries in zip(*cells, strict=True)] == wanted


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/x"), IsADirectoryError(21, "A folder", "/x")]
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error):
    def refuse(told):
        raise error

    monkeypatch.setattr(cli, "_export", refuse)
    assert command("export", "run", "--out", "x") == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "policy.learning_rate=1e-2", "beta=0.5", *SMALL],
        ["--set", "policy.learning_rate=1e-2", "--set", "beta=0.5", *[w for s in SMALL[1:] for w in ("--env-set", s)]],
    ],
)
def test_settings_stand_together_or_apart(tmp_path, options):
    told = ["--agent", "online_dpo", "--env", "duel/Synthetic-v0", "--budget", "8", "--batch", "8", "--no-recipe"]
    assert command("run", *told, "--folder", tmp_path / "run", "--eval-every", "1", *options) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["overrides"] == {"policy.learning_rate": 0.01, "beta": 0.5}
    assert config["env_kwargs"] == {"task_kwargs": {"candidates": 6, "train_prompts": 40, "heldout_prompts": 24}}


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    entry = [sys.executable, "-m", "llm_duel_env.cli"]
    told = ["run", "--agent", "uniform", "--env", "duel/Synthetic-v0", "--budget", "20000", "--batch", "2", *SMALL]
    process = subprocess.Popen([*entry, *told, "--folder", str(folder)], stdout=subprocess.PIPE, text=True, env=SINGLE)
    deadline = time.monotonic() + 120
    while not (Path(folder, "metrics.jsonl").exists() and Path(folder, "metrics.jsonl").stat().st_size > 2000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume with: llm-duel run --resume {folder}" in out
    assert (folder / "checkpoint" / "state.json").exists()
    assert not (folder / "result.json").exists()


def test_a_run_is_exported_as_preferences(tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "data" / "pairs.jsonl"
    told = ["--agent", "uniform", "--env", "duel/Synthetic-v0", "--budget", "20", "--batch", "4", *SMALL]
    assert command("run", *told, "--folder", folder) == 0
    capsys.readouterr()
    assert command("export", folder, "--out", out) == 0
    assert capsys.readouterr().out == f"20 preferences of 20 labels: {out}\n"
    records = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()[1:]]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for record, row in zip(records, rows, strict=True):
        pair = [str(record["first"]), str(record["second"])]
        chosen, rejected = pair if record["label"] == 1 else pair[::-1]
        assert row == {"prompt": str(record["prompt_id"]), "chosen": chosen, "rejected": rejected}
    ledger = (folder / "ledger.jsonl").read_bytes()
    assert command("export", folder, "--out", folder / "ledger.jsonl") == 2
    assert "is the ledger itself" in capsys.readouterr().err
    assert (folder / "ledger.jsonl").read_bytes() == ledger
    assert command("export", tmp_path / "nowhere", "--out", out) == 2
    assert not (tmp_path / "nowhere").exists()
