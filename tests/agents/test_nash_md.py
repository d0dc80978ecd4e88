"""Nash-MD: its gradient against enumeration, its opponent against the mixture token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.losses.nash_md import NashMD as NashMDLoss
from llm_duel_env.agents.nash_md import NashMD
from llm_duel_env.agents.policies.ranked import RankedLogProbs, TokenLogProbs
from llm_duel_env.agents.policies.samplers.base import numbered
from llm_duel_env.agents.policies.samplers.torch_sampler import keyed_uniforms
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic

IDS = np.array([5, 9, 2])
V = 3
FAST = {"policy.learning_rate": 1e-2, "policy.warmup": 0.0}


class TwoTokens:
    """All sequences of two tokens of V: log-probabilities per token, (V * V, 2), of logits (1 + V, V) float64."""

    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))

    @classmethod
    def log_probs(cls, logits: Tensor) -> Tensor:
        table = logits.log_softmax(dim=1)
        first, second = cls.pairs.T
        return torch.stack([table[0, first], table[1 + first, second]], dim=1)


@pytest.fixture
def problem():
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(1 + V, V, generator=draw, dtype=torch.float64) for _ in range(2))
    wins = torch.rand(V * V, V * V, generator=draw, dtype=torch.float64)  # any preference, no Bradley-Terry model
    upper = wins.triu(1)
    wins = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(V * V, dtype=torch.float64)
    return policy.requires_grad_(), reference, wins


def mixture_of(policy: Tensor, reference: Tensor, m: float) -> Tensor:
    """Probabilities (V * V,) of the sequences under the mixture, token by token."""
    mixed = (1 - m) * policy.log_softmax(dim=1) + m * reference.log_softmax(dim=1)
    return TwoTokens.log_probs(mixed).sum(dim=1).exp()


def expected_gradient(policy, reference, wins, opponent, beta, per_token):
    """The mean of the loss's gradient over all y, all y' and both labels, each as a batch of one."""
    loss = NashMDLoss(beta, per_token)
    own, other = TwoTokens.log_probs(policy), TwoTokens.log_probs(reference).detach()
    chance = own.sum(dim=1).exp().detach()
    total = torch.zeros((), dtype=torch.float64)
    for y in range(V * V):
        for rival in range(V * V):
            tokens = torch.stack([own[y], own[rival]])[None]
            ref = torch.stack([other[y], other[rival]])[None]
            for z in (0.0, 1.0):
                single = TokenLogProbs(
                    tokens, ref, torch.ones_like(ref, dtype=torch.bool), TwoTokens.pairs[None, [y, rival]]
                )
                ranked = RankedLogProbs(
                    tokens.sum(2), ref.sum(2), torch.full((1, 2), 2.0), torch.zeros(1, 2, dtype=torch.bool),
                    scores=torch.tensor([[z, 1 - z]]), tokens=single if per_token else None,
                )  # fmt: skip
                probability = wins[y, rival] if z else 1 - wins[y, rival]
                total = total + chance[y] * opponent[rival] * probability * loss(ranked)[0]
    return torch.autograd.grad(total, policy)[0]


def test_the_gradient_is_that_of_the_regularised_game_by_enumeration(problem):
    policy, reference, wins = problem
    beta = 0.3
    opponent = mixture_of(policy, reference, 0.4).detach()
    own, other = (TwoTokens.log_probs(logits).sum(dim=1) for logits in (policy, reference))
    objective = own.exp() @ wins @ opponent - beta * (own.exp() * (own - other)).sum()
    exact = -torch.autograd.grad(objective, policy)[0]
    found = expected_gradient(policy, reference, wins, opponent, beta, per_token=False)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    # TRL's form is another gradient, wherever the first token bears on the second.
    per_token = expected_gradient(policy, reference, wins, opponent, beta, per_token=True)
    assert (per_token - exact).abs().max() > 0.01 * exact.abs().max()
    assert (per_token - exact)[0].abs().max() > 0  # of the first token alone
    torch.testing.assert_close(per_token[1:], exact[1:], rtol=1e-9, atol=1e-12)


def test_the_per_token_form_is_its_formula():
    draw = torch.Generator().manual_seed(1)
    own, ref = (torch.randn(4, 2, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    own.requires_grad_()
    mask = torch.ones(4, 2, 5, dtype=torch.bool)
    z = torch.tensor([1.0, 0.0, 0.5, 1.0])
    tokens = TokenLogProbs(own, ref, mask, torch.zeros_like(mask, dtype=torch.long))
    ranked = RankedLogProbs(
        own.sum(2), ref.sum(2), torch.full((4, 2), 5.0), torch.zeros(4, 2, dtype=torch.bool),
        scores=torch.stack([z, 1 - z], dim=1), tokens=tokens,
    )  # fmt: skip
    value, metrics = NashMDLoss(0.2, per_token=True)(ranked)
    gradient = torch.autograd.grad(value, own)[0]
    expected = torch.zeros_like(own)
    for row in range(4):
        for t in range(5):
            expected[row, 0, t] = (0.2 * (own[row, 0, t] - ref[row, 0, t]) - (z[row] - 0.5)) / 4
    torch.testing.assert_close(gradient, expected.detach())
    assert metrics["preference"] == pytest.approx(0.625)


def test_only_the_sample_gets_gradient_and_a_tie_leaves_the_pull_alone():
    own = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -2.0], [-1.0, -1.0]])
    tags, scores = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    ranked = RankedLogProbs(own, reference, torch.ones(2, 2), tags, scores=scores)
    NashMDLoss(0.1)(ranked)[0].backward()
    torch.testing.assert_close(own.grad, torch.tensor([[0.1 * 1 / 2, 0.0], [(0.1 * -2 - 0.5) / 2, 0.0]]))
    with pytest.raises(ValueError, match="needs scores"):
        NashMDLoss(0.1)(RankedLogProbs(own, reference, torch.ones(2, 2), tags))
    with pytest.raises(ValueError, match="needs tokens"):
        NashMDLoss(0.1, per_token=True)(ranked)


@pytest.fixture(scope="module")
def views():
    finite = Synthetic(candidates=12, train_prompts=64, heldout_prompts=8)
    return {"finite": finite.view(), "text": make_task("tiny_tldr").view()}


@pytest.fixture(params=["finite", "text"])
def view(views, request):
    return views[request.param]


def make(view, **changes):
    return NashMD(view, NashMD.configure({**FAST, **changes}), seed=0, budget=100)


def play(view, agent, rounds, label=None):
    shown = []
    for number in range(rounds):
        duels = agent.act(view.observe(IDS + number))
        shown.append(duels.pair.responses.tolist())
        labels = (np.arange(3) + number) % 2 if label is None else np.full(3, label)
        agent.update(duels.judged(labels.astype(float)))
    return shown


def moved(view):
    """An agent whose policy is away from its reference."""
    agent = make(view)
    pair = agent.policy.sample(view.observe(IDS), 2, ("x",))
    for step in range(8):
        agent.policy.learn(direct_optimizer("simpo", 2.0), pair, progress=0.0, key=(step,))
    return agent


def weights(agent):
    model = agent.policy.scorer if hasattr(agent.policy, "scorer") else agent.policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_the_ends_of_the_mixture_are_policy_and_reference(view):
    policy, observation = moved(view).policy, view.observe(IDS)
    own = policy.sample(observation, 6, ("k",), temperature=1.0)
    reference = policy.sample(observation, 6, ("k",), temperature=1.0, reference=True)
    assert own.responses.tolist() != reference.responses.tolist()
    ends = [policy.sample(observation, 6, ("k",), temperature=1.0, mixture=m) for m in (0.0, 1.0)]
    assert ends[0].responses.tolist() == own.responses.tolist()
    assert ends[1].responses.tolist() == reference.responses.tolist()
    assert ends[1].from_reference is None  # the opponent's samples are no reference responses
    for wrong in ({"mixture": 1.5}, {"mixture": 0.5, "reference": True}):
        with pytest.raises(ValueError, match=r"mixture: expected a weight of the reference in \[0, 1\]"):
            policy.sample(observation, 1, ("k",), **wrong)


def test_the_mixture_of_candidates_is_geometric(views):
    view = views["finite"]
    policy, observation = moved(view).policy, view.observe(IDS)
    own, reference = (policy._log_softmax(s, observation).detach().double() for s in (policy.scorer, policy.reference))
    drawn = policy.sample(observation, 20_000, ("k",), temperature=1.0, mixture=0.3).responses
    found = np.stack([np.bincount(row, minlength=12) for row in drawn]) / 20_000
    expected = own.exp() ** 0.7 * reference.exp() ** 0.3
    expected = (expected / expected.sum(dim=1, keepdim=True)).numpy()
    assert np.abs(found - expected).max() < 0.015
    assert np.abs(own.exp().numpy() - expected).max() > 0.05  # it would be noticed


@pytest.mark.parametrize("share", [True, False])
def test_the_mixture_of_language_models_is_geometric_token_by_token(views, share):
    view = views["text"]
    policy, observation = moved(view).policy, view.observe(IDS)
    policy.ways = replace(policy.ways, share_prefix=share)
    drawn = policy.sample(observation, 2, ("k",), temperature=0.8, mixture=0.3)
    uniform = keyed_uniforms((0, "k"), numbered(IDS), 2, view.max_new_tokens)
    differs = 0
    for row, prompt in enumerate(policy.tokens.prompts(observation["prompt"])):
        for n in range(2):
            ids = list(prompt)
            for step in range(int(drawn.lengths[row, n])):
                with torch.no_grad():
                    own, other = (m(torch.tensor([ids])).logits[0, -1] for m in (policy.model, policy.reference))
                own, other = own.double().log_softmax(0), other.double().log_softmax(0)
                chance = ((0.7 * own + 0.3 * other) / 0.8).softmax(0).cumsum(0)
                expected = int(torch.searchsorted(chance, uniform[row, n, step], right=True))
                assert drawn.tokens[row, n, step] == expected
                alone = int(torch.searchsorted((own / 0.8).softmax(0).cumsum(0), uniform[row, n, step], right=True))
                differs += alone != expected
                ids.append(expected)
    assert differs > 0
    assert policy.generated_tokens >= drawn.lengths.sum()


def test_duels_are_of_a_sample_with_the_mixture_at_temperature_1(view):
    agent, observation = moved(view), view.observe(np.arange(20))
    agent.policy.config = replace(agent.policy.config, temperature=0.3)  # which plays no part
    pair = agent.act(observation).pair
    own = agent.policy.sample(observation, 1, ("act", 0), temperature=1.0)
    rival = agent.policy.sample(observation, 1, ("opponent", 0), temperature=1.0, mixture=0.5)
    assert pair.responses.tolist() == np.concatenate([own.responses, rival.responses], axis=1).tolist()


@pytest.mark.parametrize(("label", "sign"), [(1.0, 1), (0.0, -1)])
@pytest.mark.parametrize("kl", ["sequence", "token"])
def test_a_sample_that_won_becomes_likelier_and_one_that_lost_less_likely(view, label, sign, kl):
    agent = make(view, kl=kl, **{"policy.learning_rate": 1e-3})
    duels = agent.act(view.observe(IDS))
    own = duels.pair.take(np.zeros((3, 1), np.int64))
    before = agent.policy.log_prob(own).mean()
    learnt = agent.update(duels.judged(np.full(3, label)))
    assert learnt["preference"] == label
    assert float(agent.policy.log_prob(own).mean() - before) * sign > 1e-4


def test_a_tie_pulls_to_the_reference_and_no_label_teaches_nothing(view):
    agent = moved(view)
    agent.policy.learner.reset()  # no momentum of what moved it
    agent.policy.config = replace(agent.policy.config, learning_rate=1e-4)
    before = weights(agent).clone()
    duels = agent.act(view.observe(IDS))
    assert agent.update(duels.judged(np.full(3, np.nan))) == {}
    assert torch.equal(weights(agent), before)
    own = duels.pair.take(np.zeros((3, 1), np.int64))
    start, reference = agent.policy.log_prob(own), agent.policy.reference_log_prob(own)
    agent.update(duels.judged(np.full(3, 0.5)))
    change = agent.policy.log_prob(own) - start
    assert float(((start - reference) * change).sum()) < -1e-5


def test_a_resumed_agent_goes_on_exactly(view, tmp_path):
    agent, other = make(view, kl="token"), make(view, kl="token")
    play(view, agent, 2)
    agent.save(tmp_path)
    other.load(tmp_path)
    assert play(view, agent, 2) == play(view, other, 2)
    assert torch.equal(weights(agent), weights(other))


def test_settings_out_of_range_are_refused(views):
    for changes in ({"kl": "none"}, {"mixture": -0.1}):
        with pytest.raises(ValueError, match=r"expected kl sequence or token and mixture in \[0, 1\]"):
            make(views["finite"], **changes)
    with pytest.raises(ValueError, match="beta: expected a number of at least 0"):
        make(views["finite"], beta=-1.0)
