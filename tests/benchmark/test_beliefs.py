"""What agents believe: computed by the evaluator, from what they report, and never told to them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_helpers import config, sea, silent
from scipy.special import expit

from llm_duel_env.benchmark.beliefs import OTHERS, OTHERS_AT_END, Examiner
from llm_duel_env.benchmark.calibration import calibration
from llm_duel_env.benchmark.results import BELIEFS
from llm_duel_env.benchmark.runner import run
from llm_duel_env.oracles.feedback import Feedback
from llm_duel_env.types import Candidates


class Believer:
    """Two reward models: candidate number r is worth r, and 2 r."""

    believes = True

    def __init__(self):
        self.policy, self.asked, self.draws = self, [], 0

    def sample(self, observation, n, key, *, reference, temperature):
        assert reference
        self.draws += 1
        responses = (np.arange(n) % 3)[None, :] + (observation["prompt_id"] % 2)[:, None]
        return Candidates(observation, responses)

    def beliefs(self, observation, responses):
        self.asked.append((dict(observation), responses))
        return np.stack([responses, 2.0 * responses]).astype(np.float64)


def examined(task, feedback, agent, deployed, times=1, last=False):
    examiner = Examiner(task, feedback)
    prompts = task.observe(task.heldout_ids)
    win = task.oracle.win_probability(prompts, deployed, np.zeros(3, int)) if not task.oracle.metered else np.ones(3)
    for number in range(times):
        told = examiner.examine(agent, prompts, deployed, {"offline_win_probability": win}, 10 * number, last=last)
    return examiner, told


def test_the_figures_by_hand(finite_task):
    task, agent, deployed = finite_task(), Believer(), np.array([1, 3, 2])
    _, told = examined(task, Feedback("bernoulli"), agent, deployed, last=True)
    margin = np.array([deployed, 2 * deployed])  # the reference is candidate 0, worth 0
    assert told["belief/believed"] == pytest.approx(expit(margin).mean())
    assert told["belief/margin"] == pytest.approx(margin.mean())
    assert told["belief/spread"] == pytest.approx(margin.std(axis=0).mean())
    ids = task.heldout_ids
    utility = task.utilities[ids]
    assert told["belief/labelled"] == pytest.approx(expit(utility[[0, 1, 2], deployed] - utility[:, 0]).mean())
    others = (np.arange(OTHERS_AT_END) % 3)[None, :] + (ids % 2)[:, None]
    truth = expit(utility[:, :1] - np.take_along_axis(utility, others, axis=1)).ravel()
    pairs = np.array([-others.ravel(), -2 * others.ravel()])
    expected = calibration(expit(pairs).mean(axis=0), pairs.std(axis=0), truth)
    assert {name: told[f"belief/{name}"] for name in expected} == pytest.approx(expected)
    assert "belief/true" not in told  # this task's truth is its oracle


def test_labels_are_what_the_feedback_would_say(finite_task):
    task = finite_task()
    deployed = np.array([1, 3, 2])
    _, told = examined(task, Feedback("threshold"), Believer(), deployed)
    utility = task.utilities[task.heldout_ids]
    assert told["belief/labelled"] == pytest.approx((utility[[0, 1, 2], deployed] > utility[:, 0]).mean())
    _, noisy = examined(task, Feedback("threshold", flip_rate=0.5), Believer(), deployed)
    assert noisy["belief/labelled"] == 0.5
    assert "belief/accuracy" not in noisy  # labels that say nothing have no winner to be right about


def test_the_agent_is_shown_prompts_and_responses_and_nothing_else(finite_task):
    task, agent = finite_task(), Believer()
    deployed = np.array([1, 3, 2])
    examined(task, Feedback("bernoulli"), agent, deployed)
    ((observation, responses),) = agent.asked
    assert set(observation) == {"context", "candidates", "prompt_id"}
    assert responses.shape == (3, 2 + OTHERS)
    assert responses[:, 0].tolist() == deployed.tolist()
    assert (responses[:, 1] == 0).all()


def test_the_pairs_to_calibrate_on_are_drawn_and_judged_once(finite_task, counting_oracle):
    oracle = counting_oracle(lambda m: np.full(m, 0.8))
    task, agent = finite_task(oracle=oracle), Believer()
    calls = []
    for times in (1, 3):
        oracle.calls, agent.draws = 0, 0
        examiner, _ = examined(task, Feedback("bernoulli"), agent, np.array([1, 3, 2]), times=times)
        calls.append((oracle.calls, agent.draws))
    assert calls[0] == calls[1]
    assert [point["queries"] for point in examiner.points] == [0, 10, 20]
    assert examiner.curves()["queries"] == [0, 10, 20]
    assert len(examiner.curves()["believed"]) == 3


def test_an_oracle_that_costs_is_not_asked(finite_task, counting_oracle):
    oracle = counting_oracle()
    oracle.metered = True
    _, told = examined(finite_task(oracle=oracle), Feedback("bernoulli"), Believer(), np.array([1, 3, 2]))
    assert oracle.calls == 0
    assert "belief/believed" in told
    assert "belief/accuracy" not in told


def test_without_a_reference_nothing_is_examined(finite_task):
    examiner, told = examined(finite_task(no_reference=True), Feedback("bernoulli"), Believer(), np.array([1, 3, 2]))
    assert told == {}
    assert examiner.curves() is None


def test_examinations_come_every_eighth_of_the_budget_and_at_the_end(finite_task):
    examiner, agent = Examiner(finite_task(), Feedback("bernoulli")), Believer()
    done = []
    for queries in (0, 40, 124, 127, 160, 251, 430, 999):
        if examiner.due(agent, queries, 1000, last=False):
            examiner.points.append({"queries": queries})
            done.append(queries)
    assert done == [0, 127, 251, 430, 999]
    assert examiner.due(agent, 999, 1000, last=True)
    agent.believes = False
    assert not examiner.due(agent, 1000, 1000, last=True)


def test_a_run_keeps_them_and_learns_nothing_from_them(tmp_path, monkeypatch):
    told = sea(tmp_path / "examined")
    result = run(told, say=silent)
    found = result["beliefs"]
    assert found["queries"][0] == 0
    assert found["queries"][-1] == 200
    assert 8 <= len(found["queries"]) <= 9
    assert set(found) <= {"queries", *BELIEFS}
    assert all(0 <= value <= 1 for name in ("believed", "labelled", "accuracy") for value in found[name])
    lines = [json.loads(line) for line in Path(told.folder, "metrics.jsonl").read_text().splitlines()]
    logged = [line["belief/believed"] for line in lines if "belief/believed" in line]
    assert logged == pytest.approx(found["believed"], abs=1e-4)

    monkeypatch.setattr(Examiner, "due", lambda *args, **how: False)
    blind = run(dataclasses.replace(told, folder=str(tmp_path / "blind")), say=silent)
    assert blind["beliefs"] is None
    assert blind["ledger_sha256"] == result["ledger_sha256"]
    assert blind["curve"] == result["curve"]


def test_agents_without_reward_models_have_none(tmp_path):
    assert run(config(tmp_path / "run", budget=24), say=silent)["beliefs"] is None
