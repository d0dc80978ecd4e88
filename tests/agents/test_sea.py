import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_duel_env.agents.base import config_from
from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig
from llm_duel_env.agents.sea import SEA, SEAConfig
from llm_duel_env.baselines.sea_as_released import SEAAsReleased
from llm_duel_env.baselines.uniform import Uniform
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.oracles.base import Oracle
from llm_duel_env.randomness import generator, uniforms
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates, Preferences

FAST = {
    "policy.learning_rate": 2e-2,
    "policy.temperature": 1.0,
    "policy.warmup": 0.0,
    "candidates": 8,
    "oracle_share": 0.6,
    "beta": 0.5,
    "reward_model.members": 5,
    "reward_model.hidden": 16,
    "reward_model.batch": 16,
    "reward_model.start": 16,
}
M = 16


@pytest.fixture(scope="module")
def task():
    return Synthetic(candidates=10, train_prompts=256, heldout_prompts=64)


def sea(task, seed=0, budget=200, **changes):
    return SEA(task.view(), config_from(SEAConfig, FAST | changes), seed=seed, budget=budget)


def judge(task, duels, seed, number):
    """Bernoulli labels for every pair, asked for or not."""
    first, second = duels.pair.responses.T
    wins = uniforms(seed, "label", number + np.arange(len(first)))
    label = (wins < task.oracle.win_probability(duels.pair.observation, first, second)).astype(float)
    return np.where(first == second, 0.5, label)


def play(task, agent, rounds, start=0):
    """Plays rounds on training prompts, M at a time."""
    history = []
    for r in range(start, start + rounds):
        order = generator(agent.seed, "prompts").permutation(task.train_prompts)
        duels = agent.act(task.observe(order[(np.arange(M) + r * M) % len(order)]))
        label = judge(task, duels, agent.seed, r * M)
        history.append((duels, agent.update(duels.judged(np.where(duels.query, label, np.nan)))))
    return history


class Poisoned(Oracle):
    """Says the opposite of what it knows about the prompts that a test names, and remembers whom it was asked about."""

    def __init__(self, honest):
        self.honest, self.lies_about, self.asked = honest, set(), set()

    def win_probability(self, prompts, first, second):
        self.asked |= set(prompts["prompt_id"].tolist())
        lies = np.isin(prompts["prompt_id"], list(self.lies_about))
        truth = self.honest.win_probability(prompts, first, second)
        return np.where(lies, 1 - truth, truth)


def play_in_environment(agent_class, poison, share=0.6):
    """Eight rounds in the environment, whose oracle is poisoned on the prompts of synthetic pairs where `poison`.

    The agent, what the oracle was asked about that was synthetic, and how many pairs were.
    """
    task = Synthetic(candidates=10, train_prompts=256, heldout_prompts=64)
    task.oracle = Poisoned(task.oracle)
    overrides = {n: v for n, v in FAST.items()} | {"oracle_share": share, "burn_in": 0.0}
    agent = agent_class(task.view(), config_from(agent_class.Config, overrides), seed=0, budget=200)
    env = DuelVectorEnv(M, task=task, budget=200, feedback="threshold")
    observation, _ = env.reset(seed=0)
    leaked, synthetic = set(), 0
    for _ in range(8):
        duels = agent.act(observation)
        free = ~duels.query if agent_class is SEA else agent._model_data
        synthetic += int(free.sum())
        ids = set(observation["prompt_id"][free].tolist())
        task.oracle.lies_about, task.oracle.asked = ids if poison else set(), set()
        observation, _, _, _, info = env.step(duels.action())
        leaked |= task.oracle.asked & ids
        agent.update(duels.judged(info["preference"]))
    return agent, leaked, synthetic


def weights(agent):
    return [*agent.policy.scorer.parameters(), *agent.reward_model.weights.values()]


def test_synthetic_duels_come_after_the_burn_in_and_never_count(task):
    agent = sea(task, budget=2000)  # the burn-in is 40 queries: three rounds of 16
    history = play(task, agent, 12)
    share = [1 - duels.query.mean() for duels, _ in history]
    assert share[:3] == [0, 0, 0]
    assert 0.25 < np.mean(share[3:]) < 0.55
    decided = sum(int((duels.query & (np.diff(duels.pair.responses)[:, 0] != 0)).sum()) for duels, _ in history)
    assert agent.queries == decided
    assert agent.reward_model.buffer.added == decided
    assert history[-1][1]["synthetic_share"] == pytest.approx(share[-1])


def test_nothing_is_synthetic_before_the_ensemble_has_learnt(task):
    agent = sea(task, burn_in=0.0, **{"reward_model.start": 40})
    share = [float((~duels.query).mean()) for duels, _ in play(task, agent, 5)]
    assert share[:3] == [0, 0, 0]
    assert share[3] > 0


def test_a_poisoned_oracle_changes_nothing_of_synthetic_pairs():
    (one, leaked, synthetic), (other, also, _) = (play_in_environment(SEA, poison) for poison in (False, True))
    assert synthetic > 10
    assert leaked == also == set()  # it was not even asked
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other)))
    stored = [agent.reward_model.buffer for agent in (one, other)]
    assert torch.equal(*(buffer._pairs[: len(buffer)] for buffer in stored))
    assert one.queries == other.queries


def test_the_poison_does_bite_where_the_oracle_is_asked():
    (one, leaked, _), (other, _, _) = (play_in_environment(SEAAsReleased, poison) for poison in (False, True))
    assert leaked
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(other)))


def test_synthetic_labels_teach_the_policy_and_not_the_ensemble(task):
    agent, blind = sea(task), sea(task)
    play(task, agent, 3)
    blind.policy, blind.round, blind.queries = copy.deepcopy(agent.policy), agent.round, agent.queries
    blind.reward_model = copy.deepcopy(agent.reward_model)
    observation = task.observe(np.arange(64))
    duels = agent.act(observation)
    blind.act(observation)
    label = np.where(duels.query, judge(task, duels, 0, 0), np.nan)
    agent.update(duels.judged(label))
    blind.update(replace(duels, synthetic=np.full(64, np.nan, np.float32)).judged(label))
    assert agent.queries == blind.queries
    ensembles = [list(a.reward_model.weights.values()) for a in (agent, blind)]
    assert all(torch.equal(a, b) for a, b in zip(*ensembles))
    scorers = [list(a.policy.scorer.parameters()) for a in (agent, blind)]
    assert not all(torch.equal(a, b) for a, b in zip(*scorers))


def test_a_response_against_itself_has_exactly_no_gradient(task):
    agent = sea(task, candidates=4)
    play(task, agent, 3)
    observation = task.observe(np.arange(12))
    drawn = agent.policy.sample(observation, 2, ("pairs",)).responses
    drawn[:, 1] = np.where(drawn[:, 1] == drawn[:, 0], (drawn[:, 0] + 1) % 10, drawn[:, 1])
    same = np.arange(12) % 3 == 0
    drawn[same, 1] = drawn[same, 0]
    pair, label = Candidates(observation, drawn), np.where(same, 0.5, np.arange(12) % 2).astype(np.float32)
    preferences = Preferences(pair, label, np.ones(12, bool))

    # With the masked pairs and without them the step is the same, bit for bit; of masked pairs alone there is none.
    learners = []
    for part in (preferences, preferences.rows(~same), preferences.rows(same)):
        learner = copy.deepcopy(agent)
        learner._features = learner.policy.embed(part.pair)
        learner.learn(part)
        learners.append(learner)
    assert all(torch.equal(a, b) for a, b in zip(weights(learners[0]), weights(learners[1])))
    before, after = list(agent.policy.scorer.parameters()), list(learners[2].policy.scorer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert learners[2].reward_model.buffer.added == agent.reward_model.buffer.added

    # And in the ensemble's own objective, were such a pair to get there: a reward less itself.
    same_pair = agent.policy.embed(pair.rows(same))
    for value in torch.autograd.grad(
        agent.reward_model.objective(same_pair, 10**12).sum(), list(agent.reward_model.weights.values())
    ):
        assert float(value.abs().max()) < 1e-6  # what rounding leaves


def test_the_buffer_holds_oracle_labelled_duels_winner_first_and_nothing_else(task):
    agent, expected = sea(task), []
    for r in range(8):
        ((duels, _),) = play(task, agent, 1, start=r)
        label = judge(task, duels, agent.seed, r * M)
        for m in range(M):
            if duels.query[m] and label[m] != 0.5:
                row = agent.policy.embed(duels.pair.rows(np.array([m])))[0]
                expected.append(row if label[m] == 1 else row.flip(0))
    buffer = agent.reward_model.buffer
    torch.testing.assert_close(buffer._pairs[: len(buffer)], torch.stack(expected))


def test_a_synthetic_label_is_a_member_s_own_opinion_of_its_extremes(task):
    agent = sea(task)
    play(task, agent, 4)
    observation = task.observe(np.arange(64))
    candidates = agent.policy.sample(observation, 8, ("act", agent.round))
    rewards = agent.reward_model(agent.policy.embed(candidates))
    duels = agent.act(observation)
    heads = agent.member("synthetic", observation)
    rows = np.flatnonzero(~duels.query)
    assert len(rows) > 10
    for m in rows:
        opinion = rewards[heads[m], m]
        assert duels.pair.responses[m, 0] == candidates.responses[m, opinion.argmax()]
        assert duels.pair.responses[m, 1] == candidates.responses[m, opinion.argmin()]
        assert duels.synthetic[m] == 1
    assert np.isnan(duels.synthetic[duels.query]).all()
    assert len(set(heads.tolist())) == 5  # members are drawn for each prompt, not for the round


def test_thompson_synthetic_pairs_are_the_duel_itself(task):
    same, other = sea(task, synthetic_pair="thompson"), sea(task, oracle_share=1.0)
    play(task, same, 3)
    other.reward_model, other.policy, other.round, other.queries = (
        same.reward_model,
        same.policy,
        same.round,
        same.queries,
    )
    observation = task.observe(np.arange(64))
    duels, bought = same.act(observation), other.act(observation)
    np.testing.assert_array_equal(duels.pair.responses, bought.pair.responses)
    assert set(np.unique(duels.synthetic[~duels.query])) == {0.0, 1.0}
    assert bought.query.all()


@pytest.mark.parametrize("opponent", ["bai", "ee", "uncertainty", "passive"])
@pytest.mark.parametrize("members", [1, 5])
def test_every_opponent_plays_and_resumes_bit_for_bit(task, tmp_path, opponent, members):
    changes = {"opponent": opponent, "reward_model.members": members}
    agent = sea(task, **changes)
    play(task, agent, 5)
    agent.save(tmp_path)
    other = sea(task, **changes)
    other.load(tmp_path)
    for (duels, metrics), (again, metrics_again) in zip(play(task, agent, 4, start=5), play(task, other, 4, start=5)):
        np.testing.assert_array_equal(duels.pair.responses, again.pair.responses)
        np.testing.assert_array_equal(duels.query, again.query)
        assert metrics == metrics_again
    assert all(torch.equal(a, b) for a, b in zip(weights(agent), weights(other)))
    assert (agent.round, agent.queries) == (other.round, other.queries)


def test_draws_depend_on_the_prompt_not_on_its_batch(task):
    agent = sea(task)
    whole, part = task.observe(np.arange(20)), task.observe(np.array([7, 3]))
    assert torch.equal(agent.member("first", whole)[[7, 3]], agent.member("first", part))
    assert torch.equal(agent.draw("second", whole, 5)[[7, 3]], agent.draw("second", part, 5))
    before = agent.member("first", whole)
    agent.round += 1
    assert not torch.equal(agent.member("first", whole), before)


def test_a_prompt_that_comes_twice_in_a_round_has_draws_of_its_own(task):
    agent = sea(task)
    twice, once = task.observe(np.array([7, 3, 7])), task.observe(np.array([7, 3]))
    for count in (None, 5):
        draws = agent.draw("first", twice, count)
        assert torch.equal(draws[:2], agent.draw("first", once, count))
        assert (draws[2] != draws[0]).all()


def test_heads_are_drawn_for_each_prompt_independently(task):
    agent = sea(task)
    observation = {"prompt_id": np.arange(20_000)}
    first, synthetic = agent.member("first", observation), agent.member("synthetic", observation)
    for one, other in ((first[:-1], first[1:]), (first, synthetic)):  # neighbours, and the two draws of one prompt
        joint = torch.bincount(one * 5 + other, minlength=25) / len(one)
        assert joint.tolist() == pytest.approx([1 / 25] * 25, abs=0.006)  # standard error 0.0014


def test_the_second_thompson_winner_is_that_of_an_order_of_members_of_each_prompt_s_own(task):
    agent, m, e = sea(task, opponent="ee"), 3000, 5
    # Every member likes another candidate: the rival tells which member was asked next.
    rewards = torch.eye(e)[:, None].expand(e, m, e)
    first, second = agent.choose(rewards, torch.arange(e).expand(m, e), {"prompt_id": np.arange(m)})
    assert (first != second).all()
    joint = torch.bincount(first * e + second, minlength=e * e).view(e, e) / m
    expected = (1 - torch.eye(e)) / (e * (e - 1))
    torch.testing.assert_close(joint, expected, atol=0.016, rtol=0)  # standard error 0.004


def test_members_that_all_agree_still_duel_and_leave_synthetic_pairs_unlabelled(task):
    agent = sea(task, burn_in=0.0)
    play(task, agent, 3)
    with torch.no_grad():
        for value in agent.reward_model.weights.values():
            value.zero_()
    for opponent in ("bai", "ee", "uncertainty", "passive"):
        agent.config = replace(agent.config, opponent=opponent)
        duels = agent.act(task.observe(np.arange(64)))
        first, second = duels.pair.responses.T
        varied = [len(set(row)) > 1 for row in agent.policy.sample(duels.pair.observation, 8, ("act", 3)).responses]
        if opponent != "passive":
            assert (first != second)[varied].all()
        assert (~duels.query).any()
        assert np.isnan(duels.synthetic).all()  # nobody has an opinion


def test_duels_are_between_different_responses_where_there_are_any(task):
    agent = sea(task, **{"policy.learning_rate": 0.2})
    for duels, metrics in play(task, agent, 6):
        a, b = duels.pair.responses.T
        assert metrics["clash_rate"] == pytest.approx((a == b).mean())
        assert np.isnan(duels.synthetic[a == b]).all()


def test_best_of_n_deploys_what_the_ensemble_likes(task):
    agent = sea(task, best_of_n=10)
    play(task, agent, 8)
    observation = task.observe(task.heldout_ids)
    chosen = agent.respond(observation)
    candidates = agent.policy.sample(observation, 10, ("respond", agent.round))
    rewards = agent.reward_model(agent.policy.embed(candidates)).mean(dim=0)
    for m in range(64):
        assert chosen[m] == candidates.responses[m, rewards[m].argmax()]
    plain = sea(task)
    np.testing.assert_array_equal(plain.respond(observation), plain.policy.greedy(observation).responses[:, 0])


def test_learn_refuses_duels_that_it_did_not_propose(task):
    agent = sea(task)
    duels = agent.act(task.observe(np.arange(4)))
    with pytest.raises(ValueError, match="expected the 4 duels of the last act, got 2"):
        agent.update(duels.judged(np.ones(4)).rows(np.arange(2)))


def test_refusals(task):
    for wrong in ({"opponent": "best"}, {"synthetic_pair": "all"}, {"uncertainty": "entropy"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected one of"):
            sea(task, **wrong)
    for wrong in ({"candidates": 1}, {"oracle_share": 1.5}):
        with pytest.raises(ValueError, match="candidates >= 2 and oracle_share"):
            sea(task, **wrong)


def test_defaults_are_the_paper_s():
    config = SEAConfig()
    assert (config.candidates, config.oracle_share, config.beta, config.opponent) == (20, 0.7, 0.1, "bai")
    erm = config.reward_model
    assert (erm.members, erm.hidden, erm.anchor, erm.steps, erm.batch, erm.capacity) == (20, 128, 0.5, 5, 128, 50_000)
    assert replace(config, opponent="ee").opponent == "ee"


def test_sea_and_online_dpo_learn():
    """500 queries on 32 candidates: both end far above chance, where the agent that learns nothing stays."""
    task = Synthetic(candidates=32, train_prompts=1024, heldout_prompts=512)
    tuned = {"policy.learning_rate": 2e-2, "policy.temperature": 1.0, "policy.warmup": 0.0, "beta": 0.5}
    ensemble = {"reward_model.start": 16, "reward_model.steps": 2, "reward_model.members": 10}
    agents = {
        "sea": SEA(task.view(), config_from(SEAConfig, tuned | ensemble), seed=1, budget=500),
        "online": OnlineDPO(task.view(), config_from(OnlineDPO.Config, tuned), seed=1, budget=500),
        "uniform": Uniform(task.view(), config_from(Uniform.Config, {}), seed=1, budget=500),
    }
    observation, rate = task.observe(task.heldout_ids), {}
    for name, agent in agents.items():
        rounds = 0
        while agent.queries < 500 and rounds < 60:
            play(task, agent, 1, start=rounds)
            rounds += 1
        response, reference = agent.respond(observation), task.reference(task.heldout_ids)
        rate[name] = task.oracle.win_probability(observation, response, reference).mean()
    assert abs(rate["uniform"] - 0.5) < 0.07
    assert rate["online"] > 0.75
    assert rate["sea"] > 0.75


@pytest.mark.parametrize(
    "setting",
    [{"burn_in": -3.0}, {"burn_in": float("nan")}, {"best_of_n": -1}, {"budget": 0},
     {"reward_model": EnsembleConfig(anchor=float("nan"))}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(task, setting):
    budget = setting.get("budget", 200)
    config = SEAConfig(**{name: value for name, value in setting.items() if name != "budget"})
    name = "anchor" if "reward_model" in setting else next(iter(setting))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SEA(task.view(), config, seed=0, budget=budget)
