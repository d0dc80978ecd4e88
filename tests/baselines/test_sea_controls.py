"""The baselines that take SEA apart: what each changes, and that it changes nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_duel_env.agents import selection
from llm_duel_env.agents.base import config_from
from llm_duel_env.agents.sea import SEA
from llm_duel_env.baselines.best_of_n import BestOfN
from llm_duel_env.baselines.best_vs_worst import BestVersusWorst
from llm_duel_env.baselines.online_dpo_equal_steps import OnlineDPOEqualSteps
from llm_duel_env.baselines.passive import Passive
from llm_duel_env.baselines.sea_as_released import ReleasedEnsemble, SEAAsReleased
from llm_duel_env.baselines.uncertainty import Uncertainty
from llm_duel_env.benchmark.suite import load_suite
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.tasks.synthetic import Synthetic

M = 10
SMALL = {
    "policy.learning_rate": 2e-2,
    "policy.temperature": 1.0,
    "policy.warmup": 0.0,
    "reward_model": {"members": 4, "hidden": 8, "batch": 16, "start": 8, "steps": 2},
}


@pytest.fixture(scope="module")
def task():
    return Synthetic(candidates=12, train_prompts=256, heldout_prompts=64)


def make(agent_class, task, budget=2000, **changes):
    known = agent_class.configure({}).__dataclass_fields__
    settings = {n: v for n, v in SMALL.items() if n.split(".")[0] in known} | changes
    return agent_class(task.view(), config_from(agent_class.Config, settings), seed=0, budget=budget)


def play(task, agent, rounds, m=M, budget=2000):
    """Plays in the environment; what was shown, learnt and charged, round by round."""
    env = DuelVectorEnv(m, task=task, budget=budget)
    observation, _ = env.reset(seed=0)
    log = []
    for _ in range(rounds):
        duels = agent.act(observation)
        observation, _, _, _, info = env.step(duels.action())
        log.append((duels, agent.update(duels.judged(info["preference"])), info["charged"]))
    assert agent.queries == env.query_count
    return log


def rewards_of(agent, observation):
    """What the agent's next `act` sees: candidates and all members' rewards of them."""
    candidates = agent.policy.sample(observation, agent.config.candidates, ("act", agent.round))
    return candidates, agent.reward_model(agent.policy.embed(candidates))


def bought(agent, observation):
    """The next duels, all of them bought, as pairs of responses."""
    agent.config = type(agent.config)(**{**vars(agent.config), "oracle_share": 1.0})
    return agent.act(observation).pair.responses.tolist()


def test_passive_duels_the_first_two_samples(task):
    agent, observation = make(Passive, task), task.observe(np.arange(40))
    play(task, agent, 5)
    assert bought(agent, observation) == rewards_of(agent, observation)[0].responses[:, :2].tolist()


def test_uncertainty_duels_the_pair_whose_rewards_differ_most_variably(task):
    agent, observation = make(Uncertainty, task), task.observe(np.arange(40))
    play(task, agent, 5)
    candidates, rewards = rewards_of(agent, observation)
    for m, pair in enumerate(bought(agent, observation)):
        drawn = candidates.responses[m]
        spread = (rewards[:, m, :, None] - rewards[:, m, None, :]).var(dim=0)
        widest = {frozenset((drawn[i], drawn[j])) for i, j in zip(*np.where(spread >= spread.max() * (1 - 1e-5)))}
        assert frozenset(pair) in widest


def test_best_against_worst_looks_at_the_mean_and_not_at_who_disagrees(task):
    agent, observation = make(BestVersusWorst, task), task.observe(np.arange(40))
    play(task, agent, 5)
    candidates, rewards = rewards_of(agent, observation)
    mean = rewards.mean(dim=0)
    for m, (first, second) in enumerate(bought(agent, observation)):
        assert first == candidates.responses[m, mean[m].argmax()]
        assert second == candidates.responses[m, mean[m].argmin()]


@pytest.mark.parametrize("agent_class", [Passive, Uncertainty, BestVersusWorst])
def test_but_for_the_choice_of_duels_they_are_sea(task, agent_class):
    """Labels of the ensemble, their share and their pairs are SEA's, drawn with the same draws."""
    agent, sea = make(agent_class, task, burn_in=0.0), make(SEA, task, burn_in=0.0)
    observation = task.observe(np.arange(60))
    play(task, agent, 4)
    sea.policy, sea.reward_model, sea.round, sea.queries = agent.policy, agent.reward_model, agent.round, agent.queries
    mine, its = agent.act(observation), sea.act(observation)
    np.testing.assert_array_equal(mine.query, its.query)
    free = ~mine.query
    assert free.sum() > 5
    np.testing.assert_array_equal(mine.pair.responses[free], its.pair.responses[free])
    np.testing.assert_array_equal(mine.synthetic, its.synthetic)
    assert (mine.pair.responses[~free] != its.pair.responses[~free]).any()


def test_best_of_n_leaves_the_policy_alone_and_deploys_the_ensemble_s_favourite(task):
    agent, observation = make(BestOfN, task), task.observe(task.heldout_ids)
    start = {name: value.clone() for name, value in agent.policy.scorer.state_dict().items()}
    log = play(task, agent, 12)
    assert all(torch.equal(value, start[name]) for name, value in agent.policy.scorer.state_dict().items())
    assert all(duels.pair.from_reference.all() and duels.query.all() for duels, _, _ in log)
    assert not any("gradient_steps" in learnt for _, learnt, _ in log)
    assert agent.reward_model.buffer.added == agent.queries
    candidates = agent.policy.sample(observation, 10, ("respond", agent.round), reference=True)
    mean = agent.reward_model(agent.policy.embed(candidates)).mean(dim=0)
    expected = candidates.responses[np.arange(64), mean.argmax(dim=1)]
    np.testing.assert_array_equal(agent.respond(observation), expected)


def test_best_of_n_duels_by_double_thompson_sampling(task):
    agent, observation = make(BestOfN, task), task.observe(np.arange(60))
    play(task, agent, 4)
    candidates = agent.policy.sample(observation, 20, ("act", agent.round), reference=True)
    rewards = agent.reward_model(agent.policy.embed(candidates))
    favourites = candidates.responses[np.arange(60), rewards.argmax(dim=2)]  # (E, M), each member's
    shown = agent.act(observation).pair.responses
    for m, (first, second) in enumerate(shown):
        assert first in favourites[:, m]
        assert first != second
        if len(set(favourites[:, m])) > 1:
            assert second in favourites[:, m]
    assert not (shown[:, 0] == favourites).all(axis=1).any()  # each prompt has a member of its own
    with pytest.raises(ValueError, match="candidates >= 2, best_of >= 1"):
        make(BestOfN, task, best_of=0)


def test_equal_steps_takes_sea_s_number_of_updates(task):
    """For the same queries as many gradient steps as SEA, and more than online DPO."""
    steps = {}
    for agent_class, share in ((OnlineDPOEqualSteps, 0.5), (OnlineDPOEqualSteps, 1.0), (SEA, 0.5)):
        agent = make(agent_class, task, budget=400, oracle_share=share, burn_in=0.1, **{"policy.learning_rate": 1e-3})
        done = 0
        while agent.queries <= 360:
            done += sum(learnt.get("gradient_steps", 0) for _, learnt, _ in play_on(task, agent))
        steps[agent_class, share] = done
    # SEA: 4 rounds of 10 queries, then 32 of 5 from 40 to 360 make 68; ties and chance move both a little.
    assert steps[OnlineDPOEqualSteps, 0.5] == pytest.approx(steps[SEA, 0.5], rel=0.12)
    assert steps[OnlineDPOEqualSteps, 0.5] > 1.5 * steps[OnlineDPOEqualSteps, 1.0]


def play_on(task, agent):
    """One more round on the next prompts, labelled at random."""
    observation = task.observe((np.arange(M) + agent.round * M) % task.train_prompts)
    duels = agent.act(observation)
    first, second = duels.pair.responses.T
    label = np.where(first == second, 0.5, (first > second).astype(float))
    return [(duels, agent.update(duels.judged(np.where(duels.query, label, np.nan))), None)]


def test_equal_steps_keeps_what_it_owes_through_a_checkpoint(task, tmp_path):
    agent = make(OnlineDPOEqualSteps, task, oracle_share=0.7, burn_in=0.0)
    play(task, agent, 3)
    agent.save(tmp_path)
    other = make(OnlineDPOEqualSteps, task, oracle_share=0.7, burn_in=0.0)
    other.load(tmp_path)
    assert other.owed == agent.owed != 0
    with pytest.raises(ValueError, match="oracle_share"):
        make(OnlineDPOEqualSteps, task, oracle_share=0.0)


def test_as_released_has_an_exact_count_of_model_data_after_five_rounds(task):
    agent = make(SEAAsReleased, task)
    log = play(task, agent, 8, m=32)
    shares = [learnt["synthetic_share"] for _, learnt, _ in log]
    assert shares == [0.0] * 5 + [9 / 32] * 3  # int(0.3 * 32)


def test_as_released_charges_what_it_does_not_claim(task):
    agent = make(SEAAsReleased, task)
    log = play(task, agent, 8, m=32)
    for duels, _, charged in log:
        assert duels.query.all()
        assert np.isnan(duels.synthetic).all()
        first, second = duels.pair.responses.T
        np.testing.assert_array_equal(charged, first != second)
    last = log[-1][1]
    free = agent.queries - agent.claimed_queries
    assert 20 <= free <= 27  # three rounds of nine, less those of a response against itself
    assert last["claimed_queries"] == agent.claimed_queries < agent.queries
    assert agent.diagnose(task.observe(np.arange(4)))["claimed_queries"] == agent.claimed_queries


def test_as_released_claims_no_clash_and_gives_ties_to_the_second(task):
    agent = make(SEAAsReleased, task, burn_in=0.0)
    duels = agent.act(task.observe(np.arange(M)))
    pair = duels.pair.responses
    free = agent._model_data
    assert 0 < free.sum() < M - 2
    clash = np.flatnonzero(~free)[:2]
    pair[clash, 1] = pair[clash, 0]
    same = pair[:, 0] == pair[:, 1]
    agent._features = agent.policy.embed(duels.pair)
    before, taught = agent.claimed_queries, []
    agent.policy.update = lambda loss, preferences, **_: taught.append(preferences) or {}
    agent.update(duels.judged(np.full(M, 0.5)))  # a tie everywhere
    assert agent.claimed_queries - before == (~same & ~free).sum() < (~free).sum()
    assert taught[0].first_wins.tolist() == np.where(same, 0.5, 0.0).tolist()
    stored = agent.reward_model.buffer._pairs[:M]
    torch.testing.assert_close(stored[..., :-1], agent._features.flip(1))  # winner first
    assert stored[:, :, -1].bool().numpy().tolist() == [[kept, kept] for kept in ~(same | free)]


def test_as_released_trains_the_ensemble_on_every_pair_with_the_oracle_s_label(task):
    agent = make(SEAAsReleased, task)
    log = play(task, agent, 7, m=32)
    buffer = agent.reward_model.buffer
    assert buffer.added == 7 * 32  # the pairs of a response against itself too
    env = DuelVectorEnv(32, task=task, budget=2000)
    env.reset(seed=0)
    row = 0
    for duels, _, _ in log:
        preference = env.step(duels.action())[4]["preference"]
        features = agent.policy.embed(duels.pair)
        for m in range(32):
            order = [0, 1] if preference[m] == 1 else [1, 0]
            torch.testing.assert_close(buffer._pairs[row, :, :-1], features[m, order])
            row += 1
    masked = 1 - buffer._pairs[: 7 * 32, 0, -1]
    same = [a == b for duels, _, _ in log for a, b in duels.pair.responses]
    assert masked[: 5 * 32].tolist() == [float(s) for s in same[: 5 * 32]]
    assert masked[5 * 32 :].sum() >= 18


@torch.no_grad()
def test_the_released_objective_against_one_written_out():
    config = config_from(type(SEAAsReleased.configure({}).reward_model), {**SMALL["reward_model"], "anchor": 0.5})
    ensemble = ReleasedEnsemble(3, config, seed=1)
    draw = torch.Generator().manual_seed(0)
    for value in ensemble.weights.values():
        value.data += 0.1 * torch.randn(value.shape, generator=draw)
    pairs = torch.randn(16, 2, 4, generator=draw)
    mask = (torch.arange(16) % 4 != 0).float()
    pairs[:, :, -1] = mask[:, None]
    rewards = ensemble(pairs[..., :3])
    loss = -F.logsigmoid(rewards[:, :, 0] - rewards[:, :, 1])[..., None]  # (E, B, 1)
    released = (loss * mask[None]).mean()  # against (1, B): (E, B, B)
    moved = torch.cat([(v - ensemble.anchors[n]).flatten() ** 2 for n, v in ensemble.weights.items()])
    expected = released + 0.5 * 16 / 200 * moved.mean()
    assert float(ensemble.objective(pairs, 200).sum()) == pytest.approx(float(expected), rel=1e-5)
    assert released == pytest.approx(float(loss.mean() * mask.mean()), rel=1e-5)  # nobody is masked
    assert ensemble.optimizer.param_groups[0]["weight_decay"] == 5e-5
    first, again = ensemble.objective(pairs, 200).sum(), ensemble.objective(pairs, 400).sum()
    assert float(first - again) == pytest.approx(float(0.25 * 16 / 200 * moved.mean()), rel=1e-3)


def test_as_released_resumes_with_its_count(task, tmp_path):
    agent = make(SEAAsReleased, task)
    play(task, agent, 7)
    agent.save(tmp_path)
    other = make(SEAAsReleased, task)
    other.load(tmp_path)
    assert other.claimed_queries == agent.claimed_queries > 0
    stored = agent.reward_model.buffer
    assert torch.equal(other.reward_model.buffer._pairs, stored._pairs[: len(stored)])
    with pytest.raises(ValueError, match="duels of the last act"):
        other.update(agent.act(task.observe(np.arange(4))).judged(np.ones(4)))


def test_as_released_judges_by_logits(task):
    agent, observation = make(SEAAsReleased, task), task.observe(np.arange(40))
    play(task, agent, 4)
    with torch.no_grad():
        agent.reward_model.weights["w3"].mul_(50)  # else a sigmoid is as good as straight
    candidates, rewards = rewards_of(agent, observation)
    identity = torch.from_numpy(selection.identities(candidates.responses))
    first = selection.thompson(rewards, agent.member("first", observation))
    same, ties = selection.same_as(identity, first), agent.draw("tie", observation)
    second = selection.most_uncertain_rival(rewards, first, same, ties, "logit")
    assert (second != selection.most_uncertain_rival(rewards, first, same, ties, "probability")).sum() > 4
    expected = candidates.take(torch.stack([first, second], dim=1).numpy()).responses
    agent.config = type(agent.config)(**{**vars(agent.config), "burn_in": 1e9})
    np.testing.assert_array_equal(agent.act(observation).pair.responses, expected)


@pytest.mark.parametrize("suite", ["ablation-synthetic", "ablation-tiny-tldr"])
def test_the_ablation_is_the_paper_s_table(suite):
    """Exploration, what the ensemble's labels do, and deployment, of the seven variants of SEA's Table 1."""
    runs = {run.label: run for run in load_suite(suite, "out")}
    found = {}
    for label, run in runs.items():
        if label[0].isdigit():
            settings = vars(load_config(run))
            active = settings.get("opponent", "ee" if run.agent == "best_of_n" else "passive") != "passive"
            mixed = run.agent == "sea" and settings["oracle_share"] < 1
            found[int(label[0])] = (active, mixed, bool(settings.get("best_of_n") or settings.get("best_of")))
    assert found == {
        1: (False, False, False),
        2: (True, False, False),
        3: (True, True, False),
        4: (False, False, True),
        5: (True, False, True),
        6: (True, True, True),
        7: (True, False, True),
    }
    assert runs["7-frozen-best-of-n"].agent == "best_of_n"
    assert {"sea-as-released", "online-dpo-equal-steps", "best-vs-worst"} <= set(runs)


def load_config(run):
    from llm_duel_env.benchmark.registry import load_agent

    return load_agent(run.agent).configure(run.overrides)
