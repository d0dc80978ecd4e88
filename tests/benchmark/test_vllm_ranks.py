"""Runs that sample with vLLM on two ranks, an engine on each: the duels, labels and learning of one rank, under every
learner; whoever draws more, and whoever is killed. `make test-vllm`."""

import dataclasses
import faulthandler
import importlib.util
import json
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_helpers import SMALL_ERM, config
from test_ranks_run import KILLED, assert_alike, play

from llm_duel_env import ranks
from llm_duel_env.agents.losses import dpo
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.samplers.base import numbered
from llm_duel_env.agents.policies.scoring import log_probs
from llm_duel_env.benchmark.launcher import launch
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.tasks import make_task
from llm_duel_env.types import Preferences

if importlib.util.find_spec("vllm") is None:
    not_tested = (
        "NOT TESTED: vLLM is not installed here; `make test-vllm` runs these tests in an environment that has it"
    )
    warnings.warn(not_tested, stacklevel=1)
    pytest.skip(not_tested, allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # the first run with DeepSpeed builds its communication operation
ZERO3 = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
SEA = SMALL_ERM | {"policy.encoder": "task", "candidates": 4, "reward_model.start": 8, "burn_in": 0.3}


@pytest.fixture(autouse=True, scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE"), ("DS_ACCELERATOR", "cpu")):
            patch.setenv(name, value)
        yield


def told(folder, agent="online_dpo", **overrides):
    policy = {"policy.sampler": "vllm", "policy.learning_rate": 3e-4, "policy.temperature": 1.0}
    sizes = {
        "budget": 20,
        "batch": 5,
        "eval_prompts": 7,
        "eval_every": 0.5,
    }  # 5 and 7: no rank has as much as the other
    return config(folder, agent=agent, env="duel/TinyTLDR-v0", env_kwargs={}, overrides=policy | overrides, **sizes)


def settings_of(learner, tmp_path):
    """Settings of the policy, by name."""
    if learner == "torch":
        return {}
    pytest.importorskip("deepspeed")
    if learner == "zero2":
        return {"learner": "deepspeed"}
    path = tmp_path / "zero.json"
    path.write_text(ZERO3)
    return {"learner": "deepspeed", "deepspeed_config": str(path)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(agent, ...) -> that run with the torch learner on one rank."""
    made = {}

    def run(agent="online_dpo", **overrides):
        if agent not in made:
            made[agent] = told(tmp_path_factory.mktemp(agent) / "run", agent, **overrides)
            assert play(made[agent], 1) == 0
        return made[agent]

    return run


@pytest.mark.parametrize("learner", ["torch", "zero2", "zero3"])
def test_two_engines_play_the_run_of_one(learner, tmp_path, alone, capfd):
    settings = settings_of(learner, tmp_path)
    plan = told(tmp_path / "run", **{f"policy.{name}": value for name, value in settings.items()})
    assert play(plan, 2) == 0, capfd.readouterr().err[-6000:]
    assert_alike(alone(), plan)


def test_sea_plays_the_run_of_one(tmp_path, alone, capfd):
    plan = told(tmp_path / "run", "sea", **SEA)
    assert play(plan, 2) == 0, capfd.readouterr().err[-6000:]
    assert_alike(alone("sea", **SEA), plan)


def test_a_killed_rank_takes_the_other_along_and_two_go_on(tmp_path, alone, capfd):
    plan = dataclasses.replace(told(tmp_path / "run"), checkpoint_every=0.01)
    assert play(plan, 2, victim=1, moment=["told", 2]) == KILLED
    # By itself, before the launcher kills what is left: where it waits for the other the connection breaks.
    assert re.search("Connection (closed|reset) by peer|rank 0 of 2 ends", capfd.readouterr().err)
    assert RunFolder(plan.folder).saved() is not None
    assert not Path(plan.folder, "result.json").exists()
    assert play(plan, 2, resume=True) == 0, capfd.readouterr().err[-6000:]
    assert_alike(alone(), plan)


@pytest.mark.parametrize("learner", ["torch", "zero3"])
def test_engines_draw_what_they_like_and_hold_the_learner_s_weights(learner, tmp_path, capfd):
    command = [sys.executable, __file__, json.dumps(settings_of(learner, tmp_path))]
    assert launch(command, 2) == 0, capfd.readouterr().err[-6000:]


def as_rank(settings):
    """What each of two ranks does in the last test."""
    faulthandler.dump_traceback_later(300, exit=True)  # where one waits for the other for ever
    ranks.join("cpu")
    config = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=4, temperature=0.9, sampler="vllm", **settings)
    first = LanguageModelPolicy(make_task("tiny_tldr").view(), config, seed=0, device="cpu")
    observation = first.task.observe(np.arange(5))
    prompts, draws = first.tokens.prompts(observation["prompt"]), numbered(observation["prompt_id"])

    def draw(policy, rows):
        return policy.vllm.sample([prompts[row] for row in rows], draws[rows], (0, "a"), n=3, temperature=0.9)

    def check(policy):
        """That the engine has the policy's weights: per token, on prompts that differ from rank to rank."""
        rows = np.arange(5)[ranks.rank() :]
        drawn = draw(policy, rows)
        tokens, lengths = torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.lengths)
        with torch.no_grad(), policy.models.using(policy.model):
            asked = [prompts[row] for row in rows]
            own = log_probs(policy.model, asked, tokens, lengths, share_prefix=False, per_token=True)
        assert np.abs(own.numpy() - drawn.log_probs).max() < 1e-4

    def train(policy, number):
        candidates = policy.sample(observation, 2, ("round", number))
        means = candidates.tokens.sum(-1) / candidates.lengths
        labels = (means[:, 0] < means[:, 1]).astype(np.float32)
        preferences = Preferences(candidates, labels, np.ones(len(labels), bool))
        policy.update(partial(dpo, beta=0.1), preferences, progress=0.1, key=("shuffle", number))

    start = first.log_prob(candidates := first.sample(observation, 2, ("start",)))
    for number in range(2):
        train(first, number)
        check(first)
        for _ in range(3 * ranks.rank()):  # rank 1 goes on, and rank 0 has come to the end already
            draw(first, np.arange(4))
        ranks.meet()
    assert (first.log_prob(candidates) - start).abs().max() > 0.05
    # An engine is collected on one rank before all of them build the next one, and on the other after it.
    if ranks.rank() == 0:
        first.vllm.close()
    second = LanguageModelPolicy(make_task("tiny_tldr").view(), config, seed=0, device="cpu")
    check(second)
    if ranks.rank() == 1:
        first.vllm.close()
    train(second, 0)
    check(second)
    ranks.meet()  # torch's default group has outlived all of it


if __name__ == "__main__":
    as_rank(json.loads(sys.argv[1]))
