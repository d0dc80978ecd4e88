"""One suite that every registered agent and baseline passes."""

import json

import gymnasium
import numpy as np
import pytest

import llm_duel_env  # noqa: F401
from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent

AGENTS = sorted(list_agents())
TASKS = {
    "duel/Synthetic-v0": {"task_kwargs": {"candidates": 12, "train_prompts": 200, "heldout_prompts": 40}},
    "duel/TinyTLDR-v0": {},
}
SMALL = {"sea": {"candidates": 4, "reward_model.start": 4, "reward_model.members": 3, "burn_in": 0.0}}
LEARNERS = [name for name in AGENTS if name != "uniform"]


def make(name, env_id, *, seed=0, budget=40, batch=4, **overrides):
    env = gymnasium.make_vec(env_id, num_envs=batch, budget=budget, **TASKS[env_id])
    agent_class = load_agent(name)
    settings = {**recipe_of(env_id, name, {}), **SMALL.get(name, {}), **overrides}
    task = env.unwrapped.task
    return env, agent_class(task.view(), agent_class.configure(settings), seed=seed, budget=budget)


def play(env, agent, rounds, observation=None, seed=0):
    """Plays rounds; returns the next observation and what was shown and learnt."""
    if observation is None:
        observation, _ = env.reset(seed=seed)
    log = []
    for _ in range(rounds):
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        learnt = agent.update(duels.judged(info["preference"]))
        log.append((duels.pair.responses.tolist(), duels.query.tolist(), learnt))
    return observation, log


@pytest.fixture(params=TASKS)
def env_id(request):
    return request.param


@pytest.mark.parametrize("name", AGENTS)
def test_acts_updates_and_responds(name, env_id):
    env, agent = make(name, env_id)
    observation, log = play(env, agent, 3)
    assert agent.round == 3
    assert agent.queries == env.unwrapped.query_count
    assert all(np.isfinite(list(learnt.values())).all() for _, _, learnt in log)
    response = agent.respond(observation)
    assert response.shape == (4,)
    assert all(env.unwrapped.task.response_space.contains(r) for r in response)
    measured = agent.diagnose(observation)
    assert measured["entropy"] > 0
    assert np.isfinite(measured["kl"])
    env.close()


@pytest.mark.parametrize("name", AGENTS)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name, env_id):
    logs = []
    for seed in (0, 0, 1):
        env, agent = make(name, env_id, seed=seed)
        logs.append(play(env, agent, 3)[1])
        env.close()
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


@pytest.mark.parametrize("name", AGENTS)
def test_save_and_load_go_on_exactly(name, env_id, tmp_path):
    env, agent = make(name, env_id)
    observation, _ = play(env, agent, 2)
    agent.save(tmp_path / "saved")
    state = json.loads(json.dumps(env.unwrapped.state_dict()))
    expected = play(env, agent, 2, observation)[1]
    answers = agent.respond(observation).tolist()
    env.close()

    other_env, other = make(name, env_id)
    other_env.reset(seed=0)
    other.load(tmp_path / "saved")
    other_env.unwrapped.load_state_dict(state)
    again = play(other_env, other, 2, other_env.unwrapped.observe())[1]
    assert again == expected
    assert other.respond(observation).tolist() == answers
    other_env.close()


@pytest.mark.parametrize("name", AGENTS)
def test_rewards_and_metrics_are_never_seen(name, tmp_path, monkeypatch):
    """A whole run whose environment lies about everything but preferences buys the same labels and learns the same."""
    from llm_duel_env.benchmark.run_config import RunConfig
    from llm_duel_env.benchmark.runner import run
    from llm_duel_env.envs.vector_env import DuelVectorEnv

    honest = DuelVectorEnv.step

    def lying(self, actions):
        observation, reward, terminated, truncated, info = honest(self, actions)
        lies = {n: np.full_like(v, -1e9) for n, v in info.items() if n.startswith("metrics/")}
        return observation, np.full_like(reward, 1e9), terminated, truncated, info | lies

    found = []
    for step in (honest, lying):
        monkeypatch.setattr(DuelVectorEnv, "step", step)
        config = RunConfig(
            agent=name,
            env="duel/Synthetic-v0",
            folder=str(tmp_path / step.__name__),
            budget=32,
            batch=8,
            overrides=SMALL.get(name, {}) | {"policy.learning_rate": 1e-2},
            env_kwargs=TASKS["duel/Synthetic-v0"],
            eval_every=1.0,
            eval_prompts=16,
        )
        result = run(config, say=lambda line: None)
        curve = {key: result["curve"][key] for key in ("offline_win_probability", "kl")}
        found.append(((tmp_path / step.__name__ / "ledger.jsonl").read_bytes(), curve, result["cumulative_regret"]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] != found[1][2]  # the evaluator did see the lies


@pytest.mark.parametrize("name", AGENTS)
def test_the_budget_is_spent_and_never_overrun(name, tmp_path):
    from llm_duel_env.benchmark.run_config import RunConfig
    from llm_duel_env.benchmark.runner import run

    config = RunConfig(
        agent=name,
        env="duel/Synthetic-v0",
        folder=str(tmp_path / "run"),
        budget=37,
        batch=8,
        overrides=SMALL.get(name, {}) | {"policy.learning_rate": 1e-3},
        env_kwargs=TASKS["duel/Synthetic-v0"],
        eval_every=0.5,
        eval_prompts=16,
    )
    result = run(config)
    assert result["queries"] == 37
    labels = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert sum("label" in record for record in labels) == 37


@pytest.mark.parametrize("name", LEARNERS)
def test_learns(name):
    """500 queries on Synthetic: the deployed policy beats the uniform one's response clearly more often than not."""
    rates = []
    for seed in (0, 1):
        env = gymnasium.make_vec(
            "duel/Synthetic-v0", num_envs=16, budget=500, task_kwargs={"candidates": 32, "heldout_prompts": 256}
        )
        agent_class = load_agent(name)
        settings = agent_class.configure(recipe_of("duel/Synthetic-v0", name, {}))
        agent = agent_class(env.unwrapped.task.view(), settings, seed=seed, budget=500)
        observation, _ = env.reset(seed=seed)
        while env.unwrapped.remaining >= 16:
            observation, _ = play(env, agent, 1, observation)
        rates.append(env.unwrapped.evaluate(agent.respond)["offline_win_rate"])
        env.close()
    assert min(rates) > 0.75  # uniform: 0.5 by construction, standard error 0.03


def test_uniform_does_not_learn():
    env, agent = make("uniform", "duel/Synthetic-v0")
    before = agent.respond(env.reset(seed=0)[0]).tolist()
    play(env, agent, 3)
    assert agent.respond(env.reset(seed=0)[0]).tolist() == before
    env.close()


def test_offline_dpo_duels_between_reference_samples(env_id):
    env, agent = make("offline_dpo", env_id, **{"policy.learning_rate": 1e-3})
    observation, _ = env.reset(seed=0)
    before = agent.act(observation).pair.responses.tolist()
    play(env, agent, 3)
    agent.round = 0
    duels = agent.act(observation)
    assert duels.pair.responses.tolist() == before  # however much the policy has moved
    assert duels.pair.from_reference.all()
    env.close()


def test_online_dpo_duels_follow_the_policy():
    env, agent = make("online_dpo", "duel/Synthetic-v0", **{"policy.learning_rate": 3e-2})
    observation, _ = env.reset(seed=0)
    before = agent.act(observation).pair.responses.tolist()
    play(env, agent, 6)
    agent.round = 0
    assert agent.act(observation).pair.responses.tolist() != before
    env.close()


@pytest.mark.parametrize(
    "loss", [name for name, info in list_losses().items() if not info.needs & {"scores", "ranking"}]
)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_direct_optimizer_works_in_every_learner(name, loss):
    env, agent = make(name, "duel/Synthetic-v0", loss=loss)
    learnt = play(env, agent, 2)[1][-1][2]
    assert np.isfinite(learnt["loss"])
    env.close()


def test_loss_options_reach_the_loss_and_a_loss_that_needs_more_is_refused():
    settings = {"loss": "cdpo", "loss_options.smoothing": 0.3}
    agent = make("online_dpo", "duel/Synthetic-v0", **settings)[1]
    assert agent.optimizer.settings == {"beta": agent.config.beta, "smoothing": 0.3}
    with pytest.raises(ValueError, match=r"loss cdpo has no option 'smooth'; it has \['smoothing'\]"):
        make("sea", "duel/Synthetic-v0", loss="cdpo", **{"loss_options.smooth": 0.3})
    with pytest.raises(ValueError, match=r"loss rdo needs \['scores'\]"):
        make("online_dpo", "duel/Synthetic-v0", loss="rdo")


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no field 'betta'; it has \['beta'"):
        load_agent("online_dpo").configure({"betta": 0.2})
    with pytest.raises(ValueError, match=r"expected one of \['ada_dpo', .*'slic'\], got 'ppo'"):
        make("online_dpo", "duel/Synthetic-v0", loss="ppo")
    with pytest.raises(ValueError, match=r"expected something like 0\.1"):
        load_agent("online_dpo").configure({"beta": "large"})
