from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.batches import microbatches
from llm_duel_env.agents.policies.learners.lesson import prepare
from llm_duel_env.agents.policies.learners.loop import train
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner
from llm_duel_env.types import Candidates

CONFIG = PolicyConfig(learning_rate=1e-2, batch=5, microbatch=2, passes=2, warmup=0.0)


@given(
    count=st.integers(1, 40), micro=st.integers(1, 9), world=st.integers(1, 5), sized=st.booleans(), seed=st.integers(0)
)
def test_every_row_is_taken_once_with_its_share(count, micro, world, sized, seed):
    rng = np.random.default_rng(seed)
    batch = rng.permutation(100)[:count]
    sizes = rng.integers(1, 20, count) if sized else None
    ranks = [microbatches(batch, sizes, micro, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in ranks}) == 1  # all ranks meet in each pass
    weight = np.zeros(100)
    for parts in ranks:
        for rows, share in parts:
            assert 1 <= len(rows) <= micro
            np.add.at(weight, rows, share / len(rows))
    expected = np.zeros(100)
    expected[batch] = 1 / count
    np.testing.assert_allclose(weight, expected)


def test_rows_of_like_size_go_together():
    sizes = np.array([9, 1, 8, 2, 7, 3])
    parts = [rows for rows, _ in microbatches(np.arange(6), sizes, 2)]
    assert [sizes[rows].tolist() for rows in parts] == [[1, 2], [3, 7], [8, 9]]
    # One pass has nothing to bring together, and keeps its order.
    assert microbatches(np.arange(6), sizes, 6)[0][0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("micro", "rank", "world"), [(0, 0, 1), (1, 2, 2), (1, -1, 2)])
def test_impossible_shares_are_refused(micro, rank, world):
    with pytest.raises(ValueError, match="expected at least one row"):
        microbatches(np.arange(3), None, micro, rank, world)


class Share(TorchLearner):
    """One of several ranks without the others: keeps its gradients and takes no step."""

    def __init__(self, model, rank: int, world: int) -> None:
        super().__init__(model, CONFIG)
        self.rank, self.world, self.gradients = rank, world, []

    def step(self) -> float:
        self.gradients.append([p.grad.clone() for p in self.parameters.values()])
        return 0.0


def lesson():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (7, 2))
    observation = {"prompt_id": np.arange(7), "prompt": tuple("abcdefg")}
    tokens = rng.integers(2, 11, (7, 2, 8))
    ranked = Candidates(observation, np.full((7, 2), "x", object), tokens, lengths)
    return prepare(loss, ranked, None, None, lambda candidates, _: torch.zeros(candidates.shape))


def loss(ranked):
    margin = (ranked.policy - ranked.reference)[:, 0] - (ranked.policy - ranked.reference)[:, 1]
    return -torch.nn.functional.logsigmoid(margin).mean(), {"margin": float(margin.detach().mean())}


def gradients(rank: int, world: int, **changes):
    torch.random.manual_seed(0)
    model = torch.nn.Embedding(11, 1)
    engine = Share(model, rank, world)

    def score(candidates, per_token):
        values = model(torch.from_numpy(candidates.tokens))[..., 0]
        return torch.where(torch.arange(8) < torch.from_numpy(candidates.lengths)[..., None], values, 0).sum(-1)

    rng = np.random.default_rng(5)
    metrics = train(engine, loss, lesson(), score, config=replace(CONFIG, **changes), progress=0.0, rng=rng)
    return engine.gradients, metrics


def test_ranks_and_microbatches_sum_to_the_whole_gradient():
    whole, metrics = gradients(0, 1, microbatch=5)
    assert len(whole) == 4  # two batches, of five rows and of two, in each of two passes
    for world, micro in ((1, 2), (1, 1), (2, 2), (3, 1)):
        ranks = [gradients(rank, world, microbatch=micro) for rank in range(world)]
        for step, expected in enumerate(whole):
            total = sum(parts[step][0] for parts, _ in ranks)
            torch.testing.assert_close(total, expected[0])
        assert sum(m["margin"] for _, m in ranks) == pytest.approx(metrics["margin"])
