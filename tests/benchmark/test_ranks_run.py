"""One run on several ranks: the duels, labels and learning of one process, whoever is killed and however many go on."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmark_helpers import SMALL_ERM, config, sea, silent

from llm_duel_env.benchmark.launcher import launch
from llm_duel_env.benchmark.runner import run

CHILD = str(Path(__file__).with_name("benchmark_helpers.py"))
KILLED = 128 + signal.SIGKILL


def play(told, count, *, resume=False, victim=None, moment=None):
    plan = {"config": dataclasses.asdict(told), "resume": resume, "victim": victim, "moment": moment}
    return launch([sys.executable, CHILD, json.dumps(plan)], count)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def result(told):
    return json.loads(Path(told.folder, "result.json").read_text())


def assert_alike(one, other):
    """The same duels and labels; probabilities, and what was learnt, equal up to the order of sums."""
    ledgers = [Path(told.folder, "ledger.jsonl").read_text().splitlines() for told in (one, other)]
    assert_alike_ledgers(*([json.loads(line) for line in lines] for lines in ledgers))
    left, right = result(one), result(other)
    for name, values in left["curve"].items():
        pair = (np.asarray(found, float) for found in (values, right["curve"][name]))  # what is not known is None, NaN
        np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, err_msg=name)
    for name in ("queries", "rounds", "gradient_steps", "generated_tokens", "evaluations", "status"):
        assert left[name] == right[name], name


def assert_alike_ledgers(left, right):
    told = [[{**record, "probability": None} for record in records] for records in (left, right)]
    assert told[0] == told[1]
    chances = [[record["probability"] for record in records[1:]] for records in (left, right)]  # the first is a header
    np.testing.assert_allclose(*chances, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_play_the_language_model_run_of_one(tmp_path, capfd):
    overrides = {"policy.learning_rate": 1e-4, "policy.temperature": 1.0, "policy.encoder": "task", "candidates": 4}
    overrides |= SMALL_ERM | {"reward_model.start": 8, "burn_in": 0.3}
    base = {"agent": "sea", "env": "duel/TinyTLDR-v0", "overrides": overrides}
    base |= {"env_kwargs": {"task_kwargs": {"oracle": "reward_model"}}}  # which shares its work among the ranks
    base |= {
        "budget": 24,
        "batch": 5,
        "eval_prompts": 7,
        "eval_every": 0.5,
    }  # 5 and 7: no rank has as much as the other
    alone, together = config(tmp_path / "alone", **base), config(tmp_path / "together", **base)
    run(alone, say=silent)
    assert play(together, 2) == 0, capfd.readouterr().err
    assert_alike(alone, together)


@pytest.mark.slow
def test_whoever_is_killed_the_run_goes_on_with_any_number_of_ranks(tmp_path, capfd):
    whole = sea(tmp_path / "whole")
    run(whole, say=silent)
    broken = dataclasses.replace(whole, folder=str(tmp_path / "broken"), checkpoint_every=0.01)
    # Rank 0 with labels bought that no other rank has been told of; then, of three ranks, the last.
    assert play(broken, 2, victim=0, moment=["bought", 3]) == KILLED
    bought = len(Path(broken.folder, "ledger.jsonl").read_text().splitlines())
    assert play(broken, 3, resume=True, victim=2, moment=["told", 4]) in (KILLED, 1, 70)
    told = capfd.readouterr().err
    assert "rank" in told
    assert len(Path(broken.folder, "ledger.jsonl").read_text().splitlines()) > bought
    assert not Path(broken.folder, "result.json").exists()
    run(broken, resume=True, say=silent)
    assert_alike(whole, broken)


def test_what_rank_0_refuses_ends_all_of_them(tmp_path, capfd):
    told = config(tmp_path / "run")
    run(told, say=silent)
    assert play(told, 2) != 0
    assert "already holds a run" in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_and_the_run_goes_on(tmp_path):
    whole = sea(tmp_path / "whole")
    run(whole, say=silent)
    told = dataclasses.replace(whole, folder=str(tmp_path / "stopped"))
    words = [
        "run",
        "--agent",
        "sea",
        "--env",
        told.env,
        "--seed",
        "3",
        "--budget",
        "200",
        "--batch",
        "8",
        "--no-recipe",
    ]
    words += ["--eval-every", "0.1", "--eval-prompts", "24", "--folder", told.folder, "--ranks", "2"]
    words += ["--set", *(f"{name}={value}" for name, value in told.overrides.items())]
    words += ["--env-set", *(f"task_kwargs.{name}={value}" for name, value in told.env_kwargs["task_kwargs"].items())]
    child = subprocess.Popen(
        [sys.executable, "-m", "llm_duel_env.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ledger = Path(told.folder, "ledger.jsonl")
    until = time.monotonic() + 120
    while not (ledger.exists() and len(ledger.read_text().splitlines()) > 20) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert out.count("resume with: llm-duel run --resume") == 1
    run(told, resume=True, say=silent)
    assert_alike(whole, told)
