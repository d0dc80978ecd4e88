import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_duel_env.agents.losses import LOSSES, direct_optimizer, log_ratio_margin
from llm_duel_env.agents.policies.base import RankedLogProbs

log_probs = arrays(np.float64, (5, 2), elements=st.floats(-50, 0))
betas = st.floats(0.01, 2.0)


def plain(name, policy, reference, beta):
    """The losses once more, in plain floats, one pair at a time."""
    total = 0.0
    for (pw, pl), (rw, rl) in zip(policy.tolist(), reference.tolist()):
        h = (pw - rw) - (pl - rl)
        if name == "dpo":
            z = beta * h
            total += math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))
        elif name == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            total += max(0.0, 1 - beta * h)
    return total / len(policy)


def pairs(policy, reference):
    reference = torch.as_tensor(reference)
    return RankedLogProbs(
        policy, reference, torch.ones(reference.shape), torch.zeros(reference.shape, dtype=torch.bool)
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
@settings(max_examples=50, deadline=None)
@given(policy=log_probs, reference=log_probs, beta=betas)
def test_value_and_gradient_against_plain_floats(name, policy, reference, beta):
    theta = torch.tensor(policy, requires_grad=True)
    loss, metrics = LOSSES[name](pairs(theta, reference), beta=beta)
    expected = plain(name, policy, reference, beta)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    h = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    assert metrics["margin"] == pytest.approx(h.mean(), rel=1e-9, abs=1e-9)
    assert metrics["accuracy"] == pytest.approx((h > 0).mean(), abs=1e-6)

    kink = np.abs(1 - beta * h).min() < 1e-3
    if name == "slic" and kink:
        return  # the hinge has no derivative there
    loss.backward()
    step = 1e-5
    for i in range(5):
        for j in range(2):
            up, down = policy.copy(), policy.copy()
            up[i, j] += step
            down[i, j] -= step
            numeric = (plain(name, up, reference, beta) - plain(name, down, reference, beta)) / (2 * step)
            assert theta.grad[i, j].item() == pytest.approx(numeric, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
@settings(max_examples=20, deadline=None)
@given(policy=log_probs, reference=log_probs, shift=st.floats(-5, 5))
def test_a_shift_of_both_log_probs_of_a_pair_changes_nothing(name, policy, reference, shift):
    loss = LOSSES[name](pairs(torch.tensor(policy), reference), beta=0.3)[0]
    shifted = LOSSES[name](pairs(torch.tensor(policy + shift), reference), beta=0.3)[0]
    assert shifted.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("name", "at_zero"), [("dpo", math.log(2)), ("ipo", 1 / (2 * 0.1) ** 2), ("slic", 1.0)])
def test_at_the_reference_policy(name, at_zero):
    both = torch.full((3, 2), -7.0, dtype=torch.float64)
    assert LOSSES[name](pairs(both, both), beta=0.1)[0].item() == pytest.approx(at_zero)


def test_limits():
    far = pairs(torch.tensor([[0.0, -1e6]], dtype=torch.float64), np.zeros((1, 2)))
    wrong = pairs(torch.tensor([[-1e6, 0.0]], dtype=torch.float64), np.zeros((1, 2)))
    assert LOSSES["dpo"](far, beta=0.1)[0].item() == 0
    assert LOSSES["slic"](far, beta=0.1)[0].item() == 0
    assert LOSSES["dpo"](wrong, beta=0.1)[0].item() == pytest.approx(1e5)  # linear, and finite, where h is hopeless
    assert LOSSES["slic"](wrong, beta=0.1)[0].item() == pytest.approx(1e5 + 1)
    best = pairs(torch.tensor([[5.0, 0.0]], dtype=torch.float64), np.zeros((1, 2)))
    assert LOSSES["ipo"](best, beta=0.1)[0].item() == pytest.approx(0)  # h = 1 / (2 beta)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_winner_goes_up_and_the_loser_down(name):
    theta = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    LOSSES[name](pairs(theta, np.zeros((1, 2))), beta=0.1)[0].backward()
    assert theta.grad[0, 0] < 0 < theta.grad[0, 1]
    assert theta.grad.sum() == 0


def test_log_ratio_margin():
    policy = torch.tensor([[1.0, 2.0]])
    assert log_ratio_margin(pairs(policy, np.array([[0.5, 4.0]], np.float32))).tolist() == [2.5]


def test_direct_optimizer_fixes_beta_and_refuses_nonsense():
    chosen = direct_optimizer("ipo", 0.25)
    assert isinstance(chosen, partial)
    zero = pairs(torch.zeros(2, 2), np.zeros((2, 2), np.float32))
    assert chosen(zero)[0].item() == pytest.approx(4.0)
    with pytest.raises(ValueError, match=r"one of \['dpo', 'ipo', 'slic'\], got 'ppo'"):
        direct_optimizer("ppo", 0.1)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            direct_optimizer("dpo", beta)
