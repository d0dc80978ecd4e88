"""One suite that every registered agent and baseline passes: cheap on the finite task, one smoke on the text task."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from llm_duel_env.agents.policies import language_model
from llm_duel_env.benchmark.recipes import recipe_of
from llm_duel_env.benchmark.registry import list_agents, list_losses, load_agent
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import run
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.extras import MissingExtraError
from llm_duel_env.tasks import make_task

AGENTS = sorted(list_agents())
FINITE, TEXT = "duel/Synthetic-v0", "duel/TinyTLDR-v0"
TASKS = {
    FINITE: ("synthetic", {"candidates": 12, "train_prompts": 200, "heldout_prompts": 40}),
    TEXT: ("tiny_tldr", {}),
}
LARGER = {"candidates": 32, "train_prompts": 1024, "heldout_prompts": 256}
SMALL_IF_THERE = {
    "candidates": 4,
    "best_of": 3,
    "burn_in": 0.0,
    "reward_model": {"start": 4, "members": 3, "hidden": 16, "steps": 2},
}
"""Settings that make rounds cheap, for the agents that have them."""
SMALL: dict[str, dict] = {
    "apl": {
        "entropy_kept": 1.0,
        "certainty_kept": 1.0,
        "phases": 10,
        "epochs": 2,
    },  # a phase, and its training, a round
}
"""More of them, by agent."""
DETERMINISTIC = {"max_inp"}
WITHOUT_LESSONS = {"best_of_n", "uniform", "trl_online_dpo"}
"""Their policies never learn, or (TRL's trainer) refuse to in the background."""
RICHER = frozenset({"scores", "ranking", "reward"})
"""What an agent may learn from besides preferences; such agents stand in tables of their own."""


def plays(name, kind):
    return kind in load_agent(name).kinds


def settings_of(name):
    """The fields of an agent's Config, by name."""
    return {f.name for f in dataclasses.fields(load_agent(name).Config)}


def small(name):
    return {key: value for key, value in SMALL_IF_THERE.items() if key in settings_of(name)} | SMALL.get(name, {})


ON_FINITE = [name for name in AGENTS if plays(name, "finite")]
ON_TEXT = [name for name in AGENTS if plays(name, "text")]
BY_LESSON = {load_agent(name).learn: name for name in ON_TEXT if name not in WITHOUT_LESSONS}
"""One agent for each way of learning."""
TEXT_ONLY = [name for name in ON_TEXT if name not in ON_FINITE]
GAMES = [pytest.param(name, FINITE, id=name) for name in ON_FINITE]
GAMES += [
    pytest.param(name, TEXT, id=f"{name}-text", marks=[pytest.mark.slow] if name == "trl_online_dpo" else [])
    for name in TEXT_ONLY
]
"""Every agent on the cheapest task that it plays; TRL's trainer is the slowest of them."""
PREFERENCE_LEARNERS = [name for name in ON_FINITE if not load_agent(name).needs & RICHER]
LEARNERS = [name for name in PREFERENCE_LEARNERS if name != "uniform"]
# Those that are told the reward are left out: Stable-Baselines3's need thousands of duels before they are above chance.
LEARN_ON_FINITE = LEARNERS + [name for name in ON_FINITE if load_agent(name).needs & RICHER == {"scores"}]
# DLMA is left out where labels are counted: it asks nobody, so there is no budget to spend and no reward to lie with.
# `test_dlma` plays its run to the end, with an oracle that must not be asked.
ASKING_ON_TEXT = [name for name in TEXT_ONLY if name != "dlma"]
WITH_LOSS = [name for name in LEARNERS if "loss" in settings_of(name)]


@functools.cache
def world(task, **settings):
    """One task for all tests: tasks do not change."""
    return make_task(task, **settings)


def make(name, env_id, *, seed=0, budget=40, batch=4, task=None, **overrides):
    task = task or world(TASKS[env_id][0], **TASKS[env_id][1])
    agent_class = load_agent(name)
    lacking = agent_class.needs - task.view().provides - {"reward"}
    if lacking:
        pytest.skip(f"{env_id} does not provide {sorted(lacking)}")
    config = agent_class.configure({**recipe_of(env_id, name, {}), **small(name), **overrides})
    richer = {"scores": True} if "scores" in agent_class.needs else {}
    env = DuelVectorEnv(batch, task=task, budget=budget, **richer)
    try:
        return env, agent_class(task.view(), config, seed=seed, budget=budget)
    except MissingExtraError as missing:
        pytest.skip(f"AN EXTRA IS NOT INSTALLED: {missing}")


def play(env, agent, rounds, observation=None, seed=0):
    """Plays rounds; returns the next observation and what was shown and learnt."""
    if observation is None:
        observation, _ = env.reset(seed=seed)
        agent.prepare(env.task.view())
    log = []
    for _ in range(rounds):
        duels = agent.act(observation)
        observation, reward, _, _, info = env.step(duels.action())
        told = {n: v for n, v in {"reward": reward, "scores": info.get("scores")}.items() if n in agent.needs}
        learnt = agent.update(duels.judged(info["preference"], **told))
        log.append((duels.pair.responses.tolist(), duels.query.tolist(), learnt))
    return observation, log


def check_contract(env, agent, observation, log):
    """What holds after any rounds: counts agree, metrics are finite, responses belong to the task."""
    m = len(observation["prompt_id"])
    assert agent.round == len(log)
    assert agent.queries == env.query_count
    assert all(np.isfinite(list(learnt.values())).all() for _, _, learnt in log)
    assert all(np.shape(pairs) == (m, 2) for pairs, _, _ in log)
    response = agent.respond(observation)
    assert response.shape == (m,)
    assert all(env.task.response_space.contains(r) for r in response)
    measured = agent.diagnose(observation)
    assert measured["entropy"] > 0
    assert np.isfinite(measured["kl"])


def check_resume(make_again, env, agent, observation, folder, rounds=1):
    """Saved here and loaded there, an agent goes on exactly as it would have; returns what it did."""
    agent.save(folder)
    state = json.loads(json.dumps(env.state_dict()))
    after, expected = play(env, agent, rounds, observation)
    answers = agent.respond(after).tolist()
    other_env, other = make_again()
    other_env.reset(seed=0)
    other.load(folder)
    other_env.load_state_dict(state)
    again = play(other_env, other, rounds, other_env.observe())[1]
    assert again == expected
    assert other.respond(after).tolist() == answers
    assert (other.round, other.queries) == (agent.round, agent.queries)
    return after, expected


@pytest.mark.parametrize("name", ON_FINITE)
def test_acts_updates_responds_and_resumes(name, tmp_path):
    env, agent = make(name, FINITE)
    observation, log = play(env, agent, 3)
    check_contract(env, agent, observation, log)
    check_resume(lambda: make(name, FINITE), env, agent, observation, tmp_path, rounds=2)


@pytest.mark.parametrize("name", ON_TEXT)
def test_two_rounds_of_text_with_a_resume_between(name, tmp_path, monkeypatch):
    # Features standardised on fewer samples: the statistics are those of `embed`'s own tests, here they only cost.
    monkeypatch.setattr(language_model, "FEATURE_PROMPTS", 2)
    env, agent = make(name, TEXT, batch=3)
    observation, log = play(env, agent, 1)
    after, more = check_resume(lambda: make(name, TEXT, batch=3), env, agent, observation, tmp_path)
    check_contract(env, agent, after, log + more)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "spo" else [pytest.mark.slow]) for name in sorted(BY_LESSON.values())],
)
def test_the_first_lesson_trains_the_same_weights_in_the_background(name, monkeypatch):
    """Until its first lesson is taken on an agent acts the same either way, so whatever a loss asks the policy itself
    must be asked of what trains, not of the copy that acts. Several steps: before the first the two are equal."""
    monkeypatch.setattr(language_model, "FEATURE_PROMPTS", 2)
    found, rounds = [], 0
    for asynchronous in (False, True):
        settings = {"policy.asynchronous": asynchronous, "policy.passes": 3, "policy.learning_rate": 1e-3}
        env, agent = make(name, TEXT, **settings)  # of four prompts, which APL's phases ask for
        start = trained_weights(agent)
        observation, played = play(env, agent, 1)[0], 1
        while played < rounds or (not rounds and not agent.policy.gradient_steps):
            assert played < 4  # SELM learns at every third round at the latest
            observation, played = play(env, agent, 1, observation)[0], played + 1
        agent.policy.settle()
        rounds = played
        assert agent.policy.gradient_steps >= 3
        found.append(trained_weights(agent) - start)
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])


def trained_weights(agent):
    return torch.cat([value.detach().flatten() for value in agent.policy.models.policy.parameters()])


@pytest.mark.parametrize(("name", "env_id"), GAMES)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name, env_id, monkeypatch):
    monkeypatch.setattr(language_model, "FEATURE_PROMPTS", 2)
    batch, rounds = (4, 3) if env_id == FINITE else (3, 2)
    # The seed is the agent's; where nothing that an agent does is random, another run needs other prompts.
    prompts = (0, 0, 1) if name in DETERMINISTIC else (0, 0, 0)
    logs = [play(*make(name, env_id, batch=batch, seed=s), rounds, seed=p)[1] for s, p in zip((0, 0, 1), prompts)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def small_run(name, folder, env_id=FINITE, **changes):
    """A whole run by the benchmark's runner."""
    config = RunConfig(
        agent=name,
        env=env_id,
        folder=str(folder),
        overrides=small(name) | {"policy.learning_rate": 1e-2 if env_id == FINITE else 1e-3},
        env_kwargs={"task_kwargs": TASKS[env_id][1]},
        **{"batch": 8, "eval_prompts": 16} | changes,
    )
    try:
        return run(config, say=lambda line: None)
    except MissingExtraError as missing:
        pytest.skip(f"AN EXTRA IS NOT INSTALLED: {missing}")


SMALL_TEXT = {"env_id": TEXT, "batch": 3, "budget": 7, "eval_prompts": 4}


@pytest.mark.parametrize("name", PREFERENCE_LEARNERS)
def test_rewards_and_metrics_are_never_seen(name, tmp_path, monkeypatch):
    check_that_lies_are_not_seen(name, tmp_path, monkeypatch, budget=32, eval_every=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKING_ON_TEXT)
def test_rewards_and_metrics_are_never_seen_on_text(name, tmp_path, monkeypatch):
    check_that_lies_are_not_seen(name, tmp_path, monkeypatch, eval_every=1.0, **SMALL_TEXT)


def check_that_lies_are_not_seen(name, tmp_path, monkeypatch, **settings):
    """A whole run whose environment lies about everything but preferences, and scores where an agent is told them, buys
    the same labels and learns the same."""
    honest = DuelVectorEnv.step

    def lying(self, actions):
        observation, reward, terminated, truncated, info = honest(self, actions)
        lies = {n: np.full_like(v, -1e9) for n, v in info.items() if n.startswith("metrics/")}
        return observation, np.full_like(reward, 1e9), terminated, truncated, info | lies

    found = []
    for step in (honest, lying):
        monkeypatch.setattr(DuelVectorEnv, "step", step)
        folder = tmp_path / step.__name__
        result = small_run(name, folder, **settings)
        curve = {key: result["curve"][key] for key in ("offline_win_probability", "kl")}
        found.append(((folder / "ledger.jsonl").read_bytes(), curve, result["cumulative_regret"]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] != found[1][2]  # the evaluator did see the lies


@pytest.mark.parametrize("name", ON_FINITE)
def test_the_budget_is_spent_and_never_overrun(name, tmp_path):
    check_that_the_budget_is_spent(name, tmp_path / "run", budget=37, eval_every=0.5)


@pytest.mark.parametrize("name", ASKING_ON_TEXT)
def test_the_budget_is_spent_and_never_overrun_on_text(name, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "FEATURE_PROMPTS", 2)
    check_that_the_budget_is_spent(name, tmp_path / "run", eval_every=1.0, **SMALL_TEXT)


def check_that_the_budget_is_spent(name, folder, *, budget, **settings):
    assert small_run(name, folder, budget=budget, **settings)["queries"] == budget
    labels = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert sum("label" in record for record in labels) == budget


@pytest.mark.parametrize("name", LEARN_ON_FINITE)
def test_learns(name):
    """500 queries on Synthetic: the deployed policy beats the uniform one's response clearly more often than not."""
    task, rates = world("synthetic", **LARGER), []
    cheaper = {"reward_model": {"members": 5, "hidden": 32, "steps": 3, "batch": 64}}
    cheaper = {key: value for key, value in cheaper.items() if key in settings_of(name)}
    for seed in (0, 1):
        agent_class = load_agent(name)
        if agent_class.needs - task.view().provides:
            pytest.skip("the task does not provide what the agent needs")
        config = agent_class.configure({**recipe_of(FINITE, name, {}), **cheaper})
        env = DuelVectorEnv(32, task=task, budget=500, scores="scores" in agent_class.needs)
        agent = agent_class(task.view(), config, seed=seed, budget=500)
        observation, rounds = env.reset(seed=seed)[0], 0
        agent.prepare(task.view())
        while env.remaining >= 32 and rounds < 60:
            observation, rounds = play(env, agent, 1, observation)[0], rounds + 1
        rates.append(env.evaluate(agent.respond)["offline_win_rate"])
    assert min(rates) > 0.7  # uniform: 0.5 by construction, standard error 0.03


@pytest.mark.parametrize("name", [name for name in ON_FINITE if not load_agent(name).policy_plays])
def test_settings_of_a_policy_that_plays_no_part_change_nothing(name):
    others = {"policy.learning_rate": 0.5, "policy.temperature": 3.0, "policy.passes": 4, "policy.warmup": 0.5}
    found = []
    for settings in ({}, others):
        env, agent = make(name, FINITE, **settings)
        observation, log = play(env, agent, 3)
        found.append((log, agent.respond(observation).tolist(), agent.diagnose(observation)))
    assert found[0] == found[1]


def test_uniform_does_not_learn():
    env, agent = make("uniform", FINITE)
    before = agent.respond(env.reset(seed=0)[0]).tolist()
    play(env, agent, 3)
    assert agent.respond(env.reset(seed=0)[0]).tolist() == before


@pytest.mark.parametrize("env_id", [FINITE, TEXT])
def test_offline_dpo_duels_between_reference_samples(env_id):
    env, agent = make("offline_dpo", env_id, **{"policy.learning_rate": 1e-3})
    observation, _ = env.reset(seed=0)
    before = agent.act(observation).pair.responses.tolist()
    play(env, agent, 2)
    agent.round = 0
    duels = agent.act(observation)
    assert duels.pair.responses.tolist() == before  # however much the policy has moved
    assert duels.pair.from_reference.all()


def test_online_dpo_duels_follow_the_policy():
    env, agent = make("online_dpo", FINITE, **{"policy.learning_rate": 3e-2})
    observation, _ = env.reset(seed=0)
    before = agent.act(observation).pair.responses.tolist()
    play(env, agent, 6)
    agent.round = 0
    assert agent.act(observation).pair.responses.tolist() != before


@pytest.mark.parametrize(
    "loss", [name for name, info in list_losses().items() if not info.needs & {"scores", "ranking"}]
)
@pytest.mark.parametrize("name", WITH_LOSS)
def test_every_direct_optimizer_works_in_every_learner(name, loss):
    log = play(*make(name, FINITE, loss=loss), 3)[1]  # SELM learns at every third round at the latest
    losses = [learnt["loss"] for _, _, learnt in log if "loss" in learnt]
    assert losses
    assert np.isfinite(losses).all()


def test_loss_options_reach_the_loss_and_a_loss_that_needs_more_is_refused():
    settings = {"loss": "cdpo", "loss_options.smoothing": 0.3}
    agent = make("online_dpo", FINITE, **settings)[1]
    assert agent.optimizer.settings == {"beta": agent.config.beta, "smoothing": 0.3}
    with pytest.raises(ValueError, match=r"loss cdpo has no option 'smooth'; it has \['smoothing'\]"):
        make("sea", FINITE, loss="cdpo", **{"loss_options.smooth": 0.3})
    with pytest.raises(ValueError, match=r"loss rdo needs \['scores'\]"):
        make("online_dpo", FINITE, loss="rdo")


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no field 'betta'; it has \['beta'"):
        load_agent("online_dpo").configure({"betta": 0.2})
    with pytest.raises(ValueError, match=r"expected one of \['ada_dpo', .*'slic'\], got 'ppo'"):
        make("online_dpo", FINITE, loss="ppo")
    with pytest.raises(ValueError, match=r"expected something like 0\.1"):
        load_agent("online_dpo").configure({"beta": "large"})
