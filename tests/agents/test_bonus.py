"""Exploration bonuses: their value and gradient, their limits, and the direction in which they push."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_duel_env.agents.losses import direct_optimizer, selm, vpo, xpo
from llm_duel_env.agents.policies.ranked import RankedLogProbs

B = 4
DPO = direct_optimizer("dpo", 0.1)


def nothing(ranked):
    """A loss that is off."""
    return ranked.policy.sum() * 0.0, {}


@st.composite
def rows(draw):
    values = arrays(np.float64, (B, 2), elements=st.floats(-30, 0))
    column = arrays(np.float64, B, elements=st.floats(-30, 0))
    tags = arrays(np.bool_, (B, 2))
    return {
        "policy": draw(values), "reference": draw(values), "tags": draw(tags),
        "bonus": draw(column), "bonus_reference": draw(column),
    }  # fmt: skip


def ranked(d, policy, bonus=None, part=slice(None)):
    bonus = torch.tensor(d["bonus"]) if bonus is None else bonus
    return RankedLogProbs(
        policy[part],
        torch.tensor(d["reference"])[part],
        torch.ones(B, 2)[part],
        torch.tensor(d["tags"])[part],
        bonus=bonus[part],
        bonus_reference=torch.tensor(d["bonus_reference"])[part],
    )


def np_dpo(d, p):
    delta = p - d["reference"]
    return np.logaddexp(0, -0.1 * (delta[:, 0] - delta[:, 1])).mean()


def np_reference_response(d, p):
    """Mean over all rows of the tagged response's log-probability, a row's mean where it has two, 0 where none."""
    return sum(np.mean(p[row][d["tags"][row]]) if d["tags"][row].any() else 0.0 for row in range(B)) / B


def check(bonus, d, expected):
    """The value, and the gradients by policy and bonus by central differences of expected(policy, bonus)."""
    theta, extra = (torch.tensor(d[name], requires_grad=True) for name in ("policy", "bonus"))
    value, _ = bonus(ranked(d, theta, extra))
    assert value.item() == pytest.approx(expected(d["policy"], d["bonus"]), rel=1e-9, abs=1e-9)
    value.backward()
    for name, tensor in (("policy", theta), ("bonus", extra)):
        for index in np.ndindex(d[name].shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = {key: d[key].copy() for key in ("policy", "bonus")}
                moved[name][index] += step
                sides.append(expected(moved["policy"], moved["bonus"]))
            numeric = (sides[0] - sides[1]) / 2e-5
            got = 0.0 if tensor.grad is None else tensor.grad[index].item()
            assert got == pytest.approx(numeric, rel=1e-4, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(d=rows(), alpha=st.floats(0, 1))
def test_xpo_against_numpy(d, alpha):
    check(xpo(DPO, alpha), d, lambda p, b: np_dpo(d, p) + alpha * np_reference_response(d, p))


@settings(max_examples=40, deadline=None)
@given(d=rows(), alpha=st.floats(0, 1), beta=st.floats(0.01, 1))
def test_selm_and_vpo_against_numpy(d, alpha, beta):
    for bonus, sign in (
        (selm(DPO, alpha, beta), 1),
        (vpo(DPO, alpha, beta, "online"), 1),
        (vpo(DPO, alpha, beta, "offline"), -1),
    ):
        check(bonus, d, lambda p, b, s=sign: np_dpo(d, p) + s * alpha * beta * (b - d["bonus_reference"]).mean())


@settings(max_examples=20, deadline=None)
@given(d=rows(), alpha=st.floats(0, 1))
def test_alpha_zero_or_no_tagged_response_is_the_plain_loss(d, alpha):
    plain = DPO(ranked(d, torch.tensor(d["policy"])))[0]
    for bonus in (xpo(DPO, 0.0), selm(DPO, 0.0, 0.1), vpo(DPO, 0.0, 0.1, "offline")):
        assert torch.equal(bonus(ranked(d, torch.tensor(d["policy"])))[0], plain)
    untagged = ranked({**d, "tags": np.zeros((B, 2), bool)}, torch.tensor(d["policy"]))
    value, metrics = xpo(DPO, alpha)(untagged)
    assert torch.equal(value, plain)
    assert metrics.get("bonus_rows", 0.0) == 0.0


@settings(max_examples=20, deadline=None)
@given(d=rows())
def test_microbatches_add_up_to_the_batch(d):
    policy = torch.tensor(d["policy"])
    for bonus in (xpo(DPO, 0.5), selm(DPO, 0.5, 0.1)):
        whole, metrics = bonus(ranked(d, policy))
        total, logged = 0.0, 0.0
        for part in (slice(0, 1), slice(1, B)):
            value, some = bonus(ranked(d, policy, part=part))
            share = len(range(B)[part]) / B
            total, logged = total + share * value.item(), logged + share * some["bonus"]
        assert total == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)
        assert logged == pytest.approx(metrics["bonus"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("won", [True, False])
def test_xpo_pushes_the_reference_s_response_down_won_or_lost_and_no_other(won):
    theta = torch.full((2, 2), -3.0, requires_grad=True)
    tags = torch.tensor([[won, not won], [False, False]])
    xpo(nothing, 0.1)(RankedLogProbs(theta, torch.zeros(2, 2), torch.ones(2, 2), tags))[0].backward()
    assert theta.grad[0, 0 if won else 1] > 0  # a step against the gradient lowers it
    assert theta.grad[0, 1 if won else 0] == 0
    assert theta.grad[1].tolist() == [0, 0]


def test_what_is_missing_or_wrong_is_refused():
    pair = RankedLogProbs(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2).bool())
    with pytest.raises(ValueError, match="needs a bonus response for every row"):
        selm(DPO, 0.1, 0.1)(pair)
    with pytest.raises(ValueError, match="alpha: expected a number of at least 0, got -1"):
        xpo(DPO, -1.0)
    with pytest.raises(ValueError, match="mode: expected online or offline, got 'up'"):
        vpo(DPO, 0.1, 0.1, "up")


def test_a_bonus_wants_tokens_where_its_loss_does():
    assert xpo(direct_optimizer("bmc", 0.1), 0.1).needs_tokens
    assert not xpo(DPO, 0.1).needs_tokens
