"""One run: its budget, its evaluations, its files, and what an agent never sees."""

import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from benchmark_helpers import WORLD, config, sea, silent, untimed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_duel_env import cli
from llm_duel_env.agents.base import Agent
from llm_duel_env.baselines.uniform import Uniform
from llm_duel_env.benchmark import registry
from llm_duel_env.benchmark.heartbeat import Heartbeat, Pulse
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.runner import RunInterrupted, run
from llm_duel_env.benchmark.session import Session, within_budget
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.types import Candidates, Duels


def as_agent(monkeypatch, agent_class):
    monkeypatch.setattr(registry, "load_agent", lambda name: agent_class)


def test_the_budget_is_spent_exactly_and_the_files_are_there(tmp_path):
    told = config(tmp_path / "run", budget=101)  # no multiple of the batch
    result = run(told, say=silent)
    assert result["queries"] == 101
    assert result["status"] == "finished"
    ledger = Path(told.folder, "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == 101 + 1  # the header
    for name in ("config.json", "command.txt", "versions.json", "metrics.jsonl", "checkpoint/state.json"):
        assert Path(told.folder, name).exists()
    text = Path(told.folder, "result.json").read_text()
    assert len(text) <= 10_000
    assert json.loads(text) == result
    marks = result["curve"]["queries"]
    assert (marks[0], marks[-1]) == (0, 101)
    assert len(marks) == 11
    assert all(mark >= 10.1 * i for i, mark in enumerate(marks))


def test_a_long_curve_is_thinned_evenly_in_the_result_and_kept_in_the_metrics(tmp_path):
    told = config(tmp_path / "run", agent="uniform", overrides={}, budget=250, batch=1, eval_every=0.004)
    kept = run(told, say=silent)["curve"]["queries"]
    assert len(kept) == 101
    assert (kept[0], kept[-1]) == (0, 250)
    assert set(np.diff(kept)) <= {2, 3}
    assert sum(line["kind"] == "eval" for line in untimed(told.folder)) == 251


def test_fifty_one_points_fit_ten_kilobytes(tmp_path):
    told = config(tmp_path / "run", budget=100, batch=1, eval_every=0.02)
    result = run(told, say=silent)
    assert len(result["curve"]["queries"]) == 51
    assert Path(told.folder, "result.json").stat().st_size <= 10_000


def test_curve_and_counts_agree_with_the_metrics(tmp_path):
    told = config(tmp_path / "run")
    result = run(told, say=silent)
    lines = untimed(told.folder)
    rounds = [line for line in lines if line["kind"] == "round"]
    assert sum(line["charged"] for line in rounds) == result["queries"]
    shown = sum(line["shown"] for line in rounds)
    wins = sum(line["shown"] * line["online_win_rate"] for line in rounds) / shown
    assert result["online_win_rate"] == pytest.approx(wins, rel=1e-4)
    regret = sum(line["shown"] * line["regret"] for line in rounds)
    assert result["cumulative_regret"] == pytest.approx(regret, rel=1e-4)
    for low, mean, high in zip(*(result["curve"][n] for n in ("win_low", "offline_win_rate", "win_high"))):
        assert low <= mean <= high
    assert result["gradient_steps"] == len(rounds)


def test_tensorboard_holds_the_curve_once(tmp_path):
    told = config(tmp_path / "run")
    result = run(told, say=silent)
    events = EventAccumulator(str(Path(told.folder, "tensorboard")))
    events.Reload()
    scalars = events.Scalars("eval/offline_win_rate")
    assert [event.step for event in scalars] == result["curve"]["queries"]
    assert [event.value for event in scalars] == pytest.approx(result["curve"]["offline_win_rate"], abs=1e-4)
    assert "time/act" in events.Tags()["scalars"]


def test_the_stages_of_a_round_are_timed(tmp_path):
    told = sea(tmp_path / "run")
    result = run(told, say=silent)
    events = EventAccumulator(str(Path(told.folder, "tensorboard")))
    events.Reload()
    stages = {"agent/select": "act", "agent/erm": "update", "env/oracle": "step", "env/metrics": "step"}
    assert {f"time/{stage}" for stage in stages} <= set(events.Tags()["scalars"])
    for stage, whole in stages.items():
        assert 0 < result["time"][stage] < result["time"][whole]


def test_the_times_that_are_logged_sum_to_all_that_were_spent(tmp_path, monkeypatch):
    as_agent(monkeypatch, Slow)
    told = config(tmp_path / "run", overrides={}, checkpoint_every=0.01)
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(RunInterrupted):
        run(told, say=silent)
    spent = run(told, resume=True, say=silent)["time"]
    logged = defaultdict(float)
    lines = [json.loads(line) for line in Path(told.folder, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name, seconds in line.items():
            if name.startswith("time/"):
                logged[name.removeprefix("time/")] += seconds
    assert {"prepare", "evaluate", "checkpoint", "act", "step", "update"} <= set(spent)
    assert {name: logged[name] for name in spent} == pytest.approx(spent, rel=1e-3, abs=1e-6)
    last = lines[-2]["queries"]
    assert [line["kind"] for line in lines if line["queries"] == last and "time/evaluate" in line] == ["eval"]


def test_the_command_of_each_sitting_plays_the_run_again(tmp_path, monkeypatch):
    # The parent of a sweep's workers was started with another command than theirs.
    monkeypatch.setattr(sys, "argv", ["llm-duel", "bench", "demo"])
    told = config(tmp_path / "a run", label="mine", checkpoint_every=0.01)
    monkeypatch.setattr(Session, "finish", lambda self: self.save())
    run(told, say=silent)
    monkeypatch.undo()
    run(told, resume=True, say=silent)
    first, second = map(shlex.split, Path(told.folder, "command.txt").read_text().splitlines())
    assert second == ["llm-duel", "run", "--resume", told.folder]
    again = [str(tmp_path / "again") if word == told.folder else word for word in first[1:]]
    with pytest.raises(SystemExit) as end:
        cli.main(again)
    assert end.value.code == 0
    assert dataclasses.replace(RunConfig.read(tmp_path / "again"), label="mine", folder=told.folder) == told
    assert untimed(tmp_path / "again") == untimed(told.folder)


def test_a_batch_larger_than_the_budget_is_cut(tmp_path):
    assert run(config(tmp_path / "run", budget=5, batch=16), say=silent)["queries"] == 5


def test_within_budget_keeps_identical_pairs_and_the_first_that_fit():
    pairs = np.array([[0, 1], [2, 2], [0, 3], [1, 4], [5, 5]])
    duels = Duels(Candidates({"prompt_id": np.arange(5)}, pairs), np.array([True, True, True, True, True]))
    assert within_budget(duels, 2).query.tolist() == [True, True, True, False, True]
    assert within_budget(duels, 3) is duels
    assert within_budget(duels, 0).query.tolist() == [False, True, False, False, True]


def test_a_task_without_references_runs_resumes_and_beats(tmp_path, monkeypatch):
    from llm_duel_env.tasks.synthetic import Synthetic

    monkeypatch.setattr(Synthetic, "reference", lambda self, ids: None)
    as_agent(monkeypatch, Slow)
    told, lines = config(tmp_path / "run", overrides={}), []
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(RunInterrupted):
        run(told, say=silent)
    result = run(told, resume=True, say=lines.append)  # its curve was read back: JSON has no NaN
    assert "offline_win_rate" not in result["curve"]
    assert "100/100 queries, " in lines[-1]


def test_the_reason_why_a_run_cannot_go_on_is_not_hidden(tmp_path, monkeypatch):
    from llm_duel_env.ledger import LedgerMismatch

    told = config(tmp_path / "run", agent="uniform", overrides={})
    run(told, say=silent)
    Path(told.folder, "result.json").unlink()
    Path(told.folder, "ledger.jsonl").unlink()
    with pytest.raises(LedgerMismatch, match="bought before this state, got 0"):
        run(told, resume=True, say=silent)


class Silent(Uniform):
    """Asks four times and then never again."""

    def act(self, observation):
        """Abstains after the first round."""
        duels = super().act(observation)
        return dataclasses.replace(duels, query=np.full(len(duels.query), self.round == 0))


def test_a_run_without_queries_ends_as_stalled_and_is_scored(tmp_path, monkeypatch):
    as_agent(monkeypatch, Silent)
    result = run(config(tmp_path / "run", overrides={}, max_stalled_rounds=7), say=silent)
    assert result["status"] == "stalled"
    assert result["rounds"] in (7, 8)  # the first bought eight queries, or fewer where two responses were the same
    assert 0 < result["queries"] <= 8
    assert result["curve"]["queries"][-1] == result["queries"]


class Rare(Uniform):
    """Asks about one prompt in every third round."""

    def act(self, observation):
        """Abstains elsewhere."""
        duels = super().act(observation)
        query = np.zeros(len(duels.query), bool)
        query[0] = self.round % 3 == 0
        return dataclasses.replace(duels, query=query)


def test_a_run_that_hardly_asks_ends_as_stalled_and_says_so_after_a_resume_too(tmp_path, monkeypatch):
    as_agent(monkeypatch, Rare)
    told = config(
        tmp_path / "run", overrides={}, max_stalled_rounds=20
    )  # 8 prompts a round: 6 or 7 queries in 20 rounds
    with Session(told, RunFolder(told.folder)) as session:
        RunFolder(told.folder).create(dataclasses.asdict(told), session.fingerprint)
        session.start()
        for _ in range(15):
            session.play_round()
        assert not session.over
        session.save()
    result = run(told, resume=True, say=silent)
    assert result["status"] == "stalled"
    assert result["rounds"] == 20
    more = run(config(tmp_path / "more", overrides={}, max_stalled_rounds=40, budget=20), say=silent)  # about 11 in 40
    assert more["status"] == "finished"


def test_a_useless_oracle_stops_the_run_and_leaves_the_ledger(tmp_path, monkeypatch):
    from llm_duel_env.oracles.utility import UtilityOracle

    told = config(tmp_path / "run", agent="uniform", overrides={})
    answer, calls = UtilityOracle.win_probability, []

    def breaks(self, prompts, first, second):
        calls.append(1)
        good = answer(self, prompts, first, second)
        return good if len(calls) < 30 else np.full_like(good, np.nan)

    monkeypatch.setattr(UtilityOracle, "win_probability", breaks)
    with pytest.raises(OracleError):
        run(told, say=silent)
    ledger = Path(told.folder, "ledger.jsonl").read_bytes()
    assert len(ledger.splitlines()) > 1
    monkeypatch.setattr(UtilityOracle, "win_probability", answer)
    result = run(told, resume=True, say=silent)  # the oracle is well again
    assert result["queries"] == told.budget
    assert Path(told.folder, "ledger.jsonl").read_bytes().startswith(ledger)


class Slow(Uniform):
    """Takes its time."""

    def act(self, observation):
        """Sleeps first."""
        time.sleep(0.05)
        return super().act(observation)


def test_the_heart_beats_while_a_run_goes_on(tmp_path, monkeypatch):
    as_agent(monkeypatch, Slow)
    lines = []
    run(config(tmp_path / "run", overrides={}, heartbeat=0.1), say=lines.append)
    assert len(lines) >= 4
    assert all("queries/s" in line for line in lines)
    assert lines[-1].startswith("online_dpo on duel/Synthetic-v0, seed 3: 100/100 queries, win rate 0.")


def test_the_heart_beats_while_models_load(tmp_path, monkeypatch):
    made, lines = gymnasium.make_vec, []

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return made(*args, **kwargs)

    monkeypatch.setattr(gymnasium, "make_vec", slow)
    run(config(tmp_path / "run", heartbeat=0.1), say=lines.append)
    assert "0/100 queries, loading" in lines[0]


def test_a_task_takes_its_fingerprint_once(tmp_path, monkeypatch):
    from llm_duel_env.tasks import fingerprint

    taken, take = [], fingerprint.digest
    for module in ("base", "tiny_tldr"):
        monkeypatch.setattr(f"llm_duel_env.tasks.{module}.digest", lambda *parts: (taken.append(1), take(*parts))[1])
    for env in ("duel/Synthetic-v0", "duel/TinyTLDR-v0"):
        taken.clear()
        told = config(tmp_path / env, agent="uniform", env=env, overrides={}, env_kwargs={}, budget=2, batch=2)
        with Session(told, RunFolder(told.folder)) as session:
            assert session.fingerprint == session.core.task.fingerprint()
        assert len(taken) == 1


def test_a_rate_counts_from_the_last_restart():
    done, lines = [0], []
    with Heartbeat("job", 1000, lambda: Pulse(done[0]), say=lines.append) as heartbeat:
        done[0] = 900  # an earlier sitting's
        heartbeat.restart()
        time.sleep(0.05)
    assert "900/1000 queries, 0.0 queries/s" in lines[-1]


def test_the_heart_beats_during_one_long_step():
    lines = []
    with Heartbeat("job", 10, lambda: Pulse(4, "busy"), seconds=0.05, say=lines.append):
        time.sleep(0.3)
    assert len(lines) >= 3
    assert "job: 4/10 queries, busy" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_round_saves_and_the_run_goes_on(tmp_path, monkeypatch, number):
    as_agent(monkeypatch, Slow)
    told = config(tmp_path / "run", overrides={})
    handler = signal.getsignal(number)
    threading.Timer(0.4, os.kill, (os.getpid(), number)).start()
    with pytest.raises(RunInterrupted) as stop:
        run(told, say=silent)
    assert stop.value.folder == Path(told.folder)
    assert signal.getsignal(number) is handler
    assert not Path(told.folder, "result.json").exists()
    queries = json.loads(Path(told.folder, "checkpoint/state.json").read_text())["env"]["query_count"]
    assert 0 < queries < told.budget
    run(told, resume=True, say=silent)
    whole = config(tmp_path / "whole", overrides={})
    run(whole, say=silent)
    assert untimed(whole.folder) == untimed(told.folder)


def test_what_cannot_run_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for changes, said in [
        ({"agent": "see"}, "Did you mean 'sea'"),
        ({"env": "duel/Syntetic-v0"}, "Did you mean 'duel/Synthetic-v0'"),
        ({"overrides": {"policy.learning_rat": 1}}, "no field 'learning_rat'"),
        ({"overrides": {"policy": 3}}, "OnlineDPOConfig.policy: expected settings by name, got 3"),
        ({"overrides": {"policy": 3, "policy.batch": 4}}, "OnlineDPOConfig.policy: expected settings by name, got 3"),
        ({"env_kwargs": {"colour": 1}}, "colour"),
        ({"env_kwargs": {**WORLD, "flip_rate": 7.0}}, "flip_rate"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(config(folder, **changes), say=silent)
    as_agent(monkeypatch, type("Editor", (Uniform, Agent), {"needs": frozenset({"editor"})}))
    with pytest.raises(ValueError, match="editor"):
        run(config(folder, overrides={}), say=silent)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("field", "value"), [("budget", 0), ("batch", 1.5), ("seed", -1), ("eval_every", 0.001), ("checkpoint_every", 0)]
)
def test_settings_out_of_range_are_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        config(tmp_path, **{field: value})
