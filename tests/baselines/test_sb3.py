"""Stable-Baselines3 on a finite task: the wrapper, and PPO, A2C and DQN as agents that learn from the reward."""

import contextlib
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import llm_duel_env  # noqa: F401
from llm_duel_env.baselines import sb3_base
from llm_duel_env.baselines.sb3_features import DuelFeatures, features, random_opponents
from llm_duel_env.benchmark.registry import load_agent
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.extras import MissingExtraError
from llm_duel_env.tasks import make_task

sb3 = pytest.importorskip("stable_baselines3", reason="THE EXTRA sb3 IS NOT INSTALLED: its baselines go untested")

NAMES = ("sb3_ppo", "sb3_a2c", "sb3_dqn")
TASK = {"candidates": 6, "context_dim": 2, "candidate_dim": 4, "train_prompts": 64, "heldout_prompts": 32}
LINEAR = {"policy_kwargs": {"net_arch": []}}
QUICK = {
    "sb3_ppo": {"n_steps": 2, "batch_size": 8, "n_epochs": 3},
    "sb3_a2c": {"n_steps": 3},
    "sb3_dqn": {
        "train_freq": 2,
        "gradient_steps": 3,
        "learning_starts": 8,
        "batch_size": 8,
        "target_update_interval": 5,
    },
}


def single(random_opponent, budget=64, **task):
    env = gymnasium.make("duel/Synthetic-v0", budget=budget, task_kwargs=TASK | task)
    return DuelFeatures(env, random_opponent=random_opponent)


def build(name, budget=64, seed=0, settings=None, **task):
    agent_class = load_agent(name)
    config = agent_class.configure({"settings": QUICK[name] if settings is None else settings})
    return agent_class(make_task("synthetic", **TASK | task).view(), config, seed=seed, budget=budget)


def play(agent, rounds, batch=4, budget=64, seed=0, env=None, **task):
    """Plays rounds; returns the environment and what was shown and learnt."""
    if env is None:
        env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=batch, budget=budget, task_kwargs=TASK | task)
        env.reset(seed=seed)
    log = []
    for _ in range(rounds):
        duels = agent.act(env.unwrapped.observe())
        _, reward, _, _, info = env.step(duels.action())
        log.append((duels.pair.responses.tolist(), agent.update(duels.judged(info["preference"], reward))))
    return env, log


# The wrapper


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("random_opponent", [False, True])
def test_the_wrapper_passes_the_library_s_own_check(random_opponent):
    from stable_baselines3.common.env_checker import check_env

    env = single(random_opponent, budget=1000)
    check_env(env)
    assert env.action_space == (spaces.Discrete(6) if random_opponent else spaces.MultiDiscrete([6, 6]))
    assert env.observation_space.shape == (2 + 6 * 4,)


def test_the_wrapper_shows_the_environment_s_duels_and_rewards():
    env, plain = single(False), gymnasium.make("duel/Synthetic-v0", budget=64, task_kwargs=TASK)
    seen, _ = env.reset(seed=3)
    observation, _ = plain.reset(seed=3)
    for pair in ([1, 4], [2, 2], [5, 0]):
        row = [*observation["context"], *observation["candidates"].ravel()]
        np.testing.assert_array_equal(seen, np.array(row, np.float32))
        seen, reward, terminated, truncated, info = env.step(np.array(pair))
        observation, expected, _, _, wanted = plain.step({"first": pair[0], "second": pair[1], "query": 1})
        assert (reward, terminated, truncated) == (expected, False, False)
        assert info["query_count"] == wanted["query_count"]
    assert info["query_count"] == 2  # the identical pair was free


def test_the_budget_truncates_the_wrapper():
    env = single(True, budget=3)
    env.reset(seed=0)
    assert [env.step(k)[3] for k in (0, 1, 2)] == [False, False, True]


def test_random_opponents_are_the_others_equally_often():
    actions = np.full(6000, 2)
    drawn = random_opponents(0, 1, np.arange(6000), actions, 5)
    shares = np.bincount(drawn, minlength=5) / 6000
    assert shares[2] == 0
    assert np.abs(np.delete(shares, 2) - 0.25).max() < 0.02
    again = random_opponents(0, 1, np.arange(6000)[::-1], actions, 5)
    np.testing.assert_array_equal(again[::-1], drawn)
    assert (random_opponents(0, 2, np.arange(6000), actions, 5) != drawn).any()


def test_text_and_many_candidates_are_refused():
    with pytest.raises(ValueError, match="expected a finite task"):
        DuelFeatures(gymnasium.make("duel/TinyTLDR-v0"), random_opponent=False)
    with pytest.raises(ValueError, match="at most 32 candidates for Stable-Baselines3, got 33"):
        single(False, candidates=33)
    with pytest.raises(ValueError, match="at most 32 candidates for Stable-Baselines3, got 33"):
        build("sb3_ppo", candidates=33)
    agent_class, text = load_agent("sb3_dqn"), make_task("tiny_tldr").view()
    with pytest.raises(ValueError, match="plays finite tasks only, and tiny_tldr is a text task"):
        agent_class(text, agent_class.configure({}), seed=0, budget=4)


# The agents are the library's models


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_come_out_as_the_library_s_own_learn_makes_them(name, monkeypatch):
    """One prompt a round, and the library's global generators left alone: the same weights, bit for bit."""
    monkeypatch.setattr(sb3_base, "seeded", lambda *_: contextlib.nullcontext())
    agent = build(name, budget=42)
    agent_env, _ = play(agent, 42, batch=1, budget=None)
    env = single(name == "sb3_dqn", budget=None)
    defaults = {"buffer_size": 10_000} if name == "sb3_dqn" else {}
    maker = getattr(sb3, agent.algorithm)
    model = maker("MlpPolicy", env, gamma=0.0, seed=0, device="cpu", **defaults | QUICK[name])
    fresh = {k: v.clone() for k, v in model.policy.state_dict().items()}
    model.learn(42)
    theirs, mine = model.policy.state_dict(), agent.model.policy.state_dict()
    assert any((theirs[k] != fresh[k]).any() for k in fresh)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=0)
    assert env.unwrapped.query_count == agent_env.unwrapped.query_count == agent.queries


def test_the_defaults_are_the_library_s_but_for_gamma_and_the_buffer():
    assert build("sb3_ppo", settings={}).model.n_steps == 2048
    dqn = build("sb3_dqn", settings={}).model
    assert (dqn.gamma, dqn.buffer_size, dqn.learning_starts) == (0.0, 10_000, 100)
    with pytest.raises(ValueError, match=r"settings: A2C takes \[.*'n_steps'.*\], got \['gamma'\]"):
        build("sb3_a2c", settings={"gamma": 0.9})
    with pytest.raises(ValueError, match=r"settings: `n_steps \* n_envs` must be greater than 1"):
        build("sb3_ppo", settings={"n_steps": 1})


def test_global_generators_are_put_back():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    play(build("sb3_ppo"), 3)
    play(build("sb3_dqn"), 3)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_run_whatever_the_global_generators_do(name):
    logs = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        np.random.seed(disturbance)
        torch.manual_seed(disturbance)
        logs.append(play(build(name, seed=seed), 7, seed=seed)[1])
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_go_on_exactly(name, tmp_path):
    agent = build(name)
    env, _ = play(agent, 5)  # in the middle of a rollout
    agent.save(tmp_path)
    state = env.unwrapped.state_dict()
    expected = play(agent, 6, env=env)[1]
    other = build(name)
    other.load(tmp_path)
    other_env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=4, budget=64, task_kwargs=TASK)
    other_env.reset(seed=0)
    other_env.unwrapped.load_state_dict(json.loads(json.dumps(state)))
    assert play(other, 6, env=other_env)[1] == expected
    assert sum(learnt["gradient_steps"] for _, learnt in expected) > 0
    for mine, theirs in zip(agent.model.policy.parameters(), other.model.policy.parameters()):
        assert (mine == theirs).all()
    assert not list(tmp_path.rglob("*.zip")) + list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_from_the_reward_and_from_nothing_else(name):
    first, second, third = build(name), build(name), build(name)
    observation = make_task("synthetic", **TASK).observe(np.arange(4))
    for _ in range(6):
        duels = first.act(observation)
        second.act(observation), third.act(observation)
        reward = np.linspace(0, 1, 4)
        first.update(duels.judged(np.zeros(4), reward))
        second.update(duels.judged(np.ones(4), reward))
        third.update(duels.judged(np.zeros(4), 1 - reward))
    mine, theirs, poisoned = (
        torch.cat([p.ravel() for p in a.model.policy.parameters()]) for a in (first, second, third)
    )
    assert (mine == theirs).all()
    assert (mine != poisoned).any()
    with pytest.raises(ValueError, match="learns from the reward: expected preferences with one, got none"):
        first.update(first.act(observation).judged(np.zeros(4)))


def test_a_round_that_the_budget_cuts_is_not_learnt_from_and_another_size_is_refused():
    agent = build("sb3_dqn")
    task = make_task("synthetic", **TASK)
    duels = agent.act(task.observe(np.arange(4)))
    assert agent.update(duels.judged(np.array([1.0, np.nan, 0.0, np.nan]), np.zeros(4))) == {}
    assert agent.model.num_timesteps == agent.model.replay_buffer.pos == 0
    agent.update(agent.act(task.observe(np.arange(4))).judged(np.ones(4), np.zeros(4)))
    with pytest.raises(ValueError, match="expected rounds of 4 prompts as before, got one of 5"):
        agent.act(task.observe(np.arange(5)))


def test_diagnosis_is_of_the_policy_that_trains():
    observation = make_task("synthetic", **TASK).observe(np.arange(8))
    dqn = build("sb3_dqn")
    assert dqn.diagnose(observation) == pytest.approx({"kl": 0.0, "entropy": np.log(6)})  # random until it starts
    dqn.model.num_timesteps, dqn.model.exploration_rate = 100, 0.0
    assert dqn.diagnose(observation) == pytest.approx({"kl": np.log(6), "entropy": 0.0}, abs=1e-9)
    ppo = build("sb3_ppo")
    seen = torch.from_numpy(features(observation))
    heads = ppo.model.policy.get_distribution(seen).distribution
    assert ppo.diagnose(observation)["entropy"] == pytest.approx(float(heads[0].entropy().mean().detach()), rel=1e-5)
    np.testing.assert_array_equal(ppo.respond(observation), heads[0].probs.argmax(dim=1).numpy())


# In the runner


def test_a_run_counts_evaluations_and_stands_in_a_table_of_its_own(tmp_path):
    from llm_duel_env.benchmark.leaderboard import tables

    results = []
    for name, overrides in (("sb3_dqn", {"settings": QUICK["sb3_dqn"]}), ("uniform", {})):
        config = RunConfig(
            agent=name, env="duel/Synthetic-v0", folder=str(tmp_path / name), budget=22, batch=4, overrides=overrides,
            env_kwargs={"task_kwargs": TASK}, eval_every=0.5, eval_prompts=16,
        )  # fmt: skip
        results.append(run(config, say=lambda line: None))
    assert results[0]["queries"] == 22
    assert (results[0]["needs"], results[0]["evaluations"]) == (["reward"], 44)
    assert (results[1]["needs"], results[1]["evaluations"]) == ([], 0)
    found = {table.asks: [row.label for row in table.rows] for table in tables(results)}
    assert found == {("reward",): ["sb3_dqn"], (): ["uniform"]}


def test_without_the_extra_the_error_names_it(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    agent_class, view = load_agent("sb3_ppo"), make_task("synthetic", **TASK).view()
    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=r"agent SB3PPO needs .*llm-duel-env\[sb3\]"):
        agent_class(view, agent_class.configure({}), seed=0, budget=4)


LEARNING = {
    "sb3_ppo": {"n_steps": 2, "learning_rate": 3e-3, "batch_size": 256} | LINEAR,
    "sb3_a2c": {"n_steps": 1, "learning_rate": 1e-2, "normalize_advantage": True, "use_rms_prop": False} | LINEAR,
    "sb3_dqn": {"train_freq": 1, "gradient_steps": 16, "learning_rate": 3e-3, "batch_size": 256}
    | {"exploration_fraction": 1.0}
    | LINEAR,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learns_on_synthetic(name):
    """40,000 duels with 16 candidates: the deployed response beats a uniform one (0.5, standard error 0.011).

    Reinforcement learning on indices of candidates knows nothing of what they share: it needs a hundred times the
    duels of a linear bandit, and ends far lower.
    """
    task = {"candidates": 16, "context_dim": 1, "train_prompts": 2048, "heldout_prompts": 2048}
    agent = build(name, budget=40_000, settings=LEARNING[name], **task)
    env, _ = play(agent, 78, batch=512, budget=40_000, **task)
    assert env.unwrapped.evaluate(agent.respond)["offline_win_rate"] > 0.55
