"""What both kinds of policy do with ranked responses, scores, bonus responses and tokens; and `reset`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_duel_env.agents.losses import direct_optimizer, selm, vpo, xpo
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.types import Candidates, Preferences

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=6, microbatch=2, temperature=1.0)
DPO = direct_optimizer("dpo", 0.5)
IDS = np.array([3, 11, 3, 40, 8, 21])
GIVES = frozenset({"scores", "ranking"})


@pytest.fixture(params=["finite", "text"])
def make(request, model_folder):
    """make(**changes of the config) -> a policy, the same each time."""
    finite = request.param == "finite"
    view = Synthetic(candidates=12, train_prompts=64).view() if finite else fixtures.make_view(model_folder())
    return lambda **changes: make_policy(view, replace(CONFIG, **changes), seed=0)


def observe(policy, ids=IDS):
    return (
        policy.task.observe(ids) if hasattr(policy, "task") else Synthetic(candidates=12, train_prompts=64).observe(ids)
    )


def sample(policy, n, name="ranked", **kwargs):
    return policy.sample(observe(policy), n, (name,), **kwargs)


def weights(policy):
    model = policy.scorer if hasattr(policy, "scorer") else policy.model
    return torch.cat([value.detach().flatten() for value in model.parameters()])


class Recorder:
    """A loss that is off, and keeps what it is shown."""

    def __init__(self, needs_tokens=False):
        self.needs_tokens, self.seen = needs_tokens, []

    def __call__(self, ranked):
        self.seen.append(ranked)
        return ranked.policy.sum() * 0.0, {}

    def column(self, name):
        return torch.cat([getattr(ranked, name).detach() for ranked in self.seen])


def nothing(ranked):
    return ranked.policy.sum() * 0.0, {}


def test_a_loss_sees_the_ranking_as_it_is(make):
    policy = make(batch=4, microbatch=3)
    ranked = Candidates.beside(sample(policy, 3), sample(policy, 1, "other", reference=True))
    scores, seen = np.arange(24, dtype=np.float32).reshape(6, 4), Recorder()
    metrics = policy.learn(seen, ranked, progress=0.0, key=("u",), scores=scores)
    assert (metrics["pairs"], metrics["gradient_steps"]) == (6.0, 2.0)
    order = seen.column("scores")[:, 0].long() // 4  # scores number the rows
    assert sorted(order.tolist()) == list(range(6))
    torch.testing.assert_close(seen.column("scores"), torch.tensor(scores)[order])
    torch.testing.assert_close(seen.column("policy"), policy.log_prob(ranked)[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.column("reference"), policy.reference_log_prob(ranked)[order], rtol=1e-4, atol=1e-4)
    assert seen.column("from_reference").tolist() == [[False, False, False, True]] * 6
    lengths = np.ones((6, 4)) if ranked.lengths is None else ranked.lengths
    assert seen.column("lengths").tolist() == lengths[order].tolist()
    assert [len(part.policy) for part in seen.seen] == [3, 1, 2]
    assert [len(part.batch_scores) for part in seen.seen] == [4, 4, 2]
    assert sorted(seen.seen[0].batch_scores.flatten().tolist()) == sorted(
        torch.cat([part.scores for part in seen.seen[:2]]).flatten().tolist()
    )


def test_update_puts_winners_first_with_their_scores_and_leaves_out_the_undecided(make):
    policy = make()
    pair, bonus = sample(policy, 2), sample(policy, 1, "bonus")
    labels = np.array([1, 0, 0.5, np.nan, 0, 1], np.float32)
    scores, seen = np.arange(12, dtype=np.float32).reshape(6, 2), Recorder()
    scores[2] = np.nan  # belongs to a tie
    told = {"progress": 0.0, "key": ("u",), "scores": scores, "bonus": bonus}
    policy.update(seen, Preferences(pair, labels, np.ones(6, bool)), **told)
    rows = seen.column("scores").amin(1).long() // 2
    assert sorted(rows.tolist()) == [0, 1, 4, 5]
    winner = np.array([0, 1, 0, 0, 1, 0])[rows]
    expected = np.stack([scores[rows, winner], scores[rows, 1 - winner]], axis=1)
    assert seen.column("scores").tolist() == expected.tolist()
    shown = policy.log_prob(pair).numpy()
    np.testing.assert_allclose(seen.column("policy")[:, 0], shown[rows, winner], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen.column("bonus"), policy.log_prob(bonus)[rows, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen.column("bonus_reference"), policy.reference_log_prob(bonus)[rows, 0], atol=1e-4)


def test_tokens_come_when_asked_for_and_add_up(make):
    policy, seen = make(), Recorder(needs_tokens=True)
    ranked, bonus = sample(policy, 3), sample(policy, 1, "bonus")
    policy.update(
        DPO, Preferences(ranked.take(np.tile([0, 1], (6, 1))), np.ones(6), np.ones(6, bool)), progress=0.0, key=(0,)
    )
    own, of_bonus = policy.log_prob(ranked), policy.log_prob(bonus)  # before a step that the moments alone would take
    policy.learn(seen, ranked, progress=0.0, key=("u",), bonus=bonus, scores=np.tile(np.arange(6.0)[:, None], 3))
    order = seen.column("scores")[:, 0].long()
    torch.testing.assert_close(seen.column("policy"), own[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.column("bonus"), of_bonus[order, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.column("reference"), policy.reference_log_prob(ranked)[order], rtol=1e-4, atol=1e-4)
    for part in seen.seen:
        torch.testing.assert_close(part.tokens.policy.sum(2), part.policy)
        torch.testing.assert_close(part.tokens.reference.sum(2), part.reference)
        assert (part.tokens.policy[~part.tokens.mask] == 0).all()
        assert torch.equal(part.tokens.mask.sum(2), part.lengths.long())
    ids = torch.cat([part.tokens.ids for part in seen.seen])
    wanted = ranked.responses[..., None] if ranked.tokens is None else ranked.tokens
    assert torch.equal(ids[..., : wanted.shape[2]], torch.from_numpy(wanted)[order])
    assert Recorder().needs_tokens is False
    plain = Recorder()
    policy.learn(plain, ranked, progress=0.0, key=("u",))
    assert plain.seen[0].tokens is None
    assert plain.seen[0].scores is plain.seen[0].bonus is None


def some_tagged(policy, n):
    """Rankings in which rows 0, 1 and 4 hold a response of the reference."""
    tags = np.zeros((6, n), bool)
    tags[[0, 1, 4], [0, 1, 1]] = True
    return replace(sample(policy, n), from_reference=tags)


def unscaled(ranked):
    """RDO normalised over the microbatch: what must not happen."""
    return direct_optimizer("rdo", 0.5, gives=GIVES)(replace(ranked, batch_scores=None))


LEARN = {
    "rdo": lambda: direct_optimizer("rdo", 0.5, gives=GIVES),
    "pro": lambda: direct_optimizer("pro", 0.5, gives=GIVES),
    "bmc": lambda: direct_optimizer("bmc", 0.5),
    "xpo": lambda: xpo(DPO, 0.3),
    "selm": lambda: selm(DPO, 0.3, 0.5),
    "wrong": lambda: unscaled,
}


@pytest.mark.parametrize("name", LEARN)
def test_results_do_not_depend_on_the_microbatch(make, name):
    found, logged = [], []
    for microbatch in (6, 4, 1):
        policy = make(microbatch=6)
        policy.learn(DPO, sample(policy, 2, "before"), progress=0.0, key=(1,))  # away from the reference
        policy.config = replace(policy.config, microbatch=microbatch)
        ranked = some_tagged(policy, 3 if name in ("rdo", "pro") else 2)
        scores = np.cumsum(np.arange(1, 1 + ranked.responses.size, dtype=np.float32)).reshape(ranked.shape)[:, ::-1]
        told = {"progress": 0.0, "scores": scores.copy(), "bonus": sample(policy, 1, "bonus")}
        logged.append(policy.learn(LEARN[name](), ranked, key=(0,), **told))
        found.append(logged[-1]["grad_norm"])
    if name == "wrong":
        assert abs(found[2] / found[0] - 1) > 0.01
        return
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-4)
    for metrics in logged[1:]:
        assert metrics == pytest.approx(logged[0], rel=1e-3, abs=1e-5)


BONUSES = {
    "xpo": (lambda: xpo(nothing, 0.1), -1),
    "selm": (lambda: selm(nothing, 0.1, 0.1), -1),
    "vpo online": (lambda: vpo(nothing, 0.1, 0.1, "online"), -1),
    "vpo offline": (lambda: vpo(nothing, 0.1, 0.1, "offline"), 1),
}


@pytest.mark.parametrize("name", BONUSES)
@pytest.mark.parametrize("won", [True, False])
def test_with_the_loss_off_one_step_moves_the_bonus_response_the_right_way(make, name, won):
    policy = make(batch=6, learning_rate=1e-3)
    sides = [sample(policy, 1, "reference", reference=True), sample(policy, 1)]
    pair = Candidates.beside(*(sides if won else sides[::-1]))
    bonus, (loss, sign) = sides[0], BONUSES[name]
    before = policy.log_prob(bonus).mean()
    metrics = policy.learn(loss(), pair, progress=0.0, key=(0,), bonus=bonus)
    change = float(policy.log_prob(bonus).mean() - before)
    assert change * sign > 1e-4
    assert metrics["gradient_steps"] == metrics["bonus_rows"] == 1.0


def test_a_bonus_of_another_reference_is_scored_anew(make):
    policy = make()
    pair, bonus = sample(policy, 2), sample(policy, 1, "bonus")
    pair = replace(pair, reference_log_prob=policy.reference_log_prob(pair).numpy())
    policy.learn(DPO, pair, progress=0.0, key=(0,))
    policy.move_reference()
    bonus = replace(bonus, reference_log_prob=policy.reference_log_prob(bonus).numpy(), reference_version=1)
    own, of_bonus, seen = policy.log_prob(pair), policy.log_prob(bonus), Recorder()
    scores = np.tile(np.arange(6.0)[:, None], 2)
    policy.learn(seen, pair, progress=0.0, key=(1,), bonus=bonus, scores=scores)
    order = seen.column("scores")[:, 0].long()
    torch.testing.assert_close(seen.column("bonus_reference"), of_bonus[order, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.column("reference"), own[order], rtol=1e-4, atol=1e-4)


def test_a_ranking_is_learnt(make):
    policy = make(learning_rate=1e-2)
    ranked = sample(policy, 3)
    scores = np.tile([[4.0, 2.0, 0.0]], (6, 1))
    start = policy.log_prob(ranked)
    for step in range(10):
        policy.learn(direct_optimizer("pro", 0.1, gives=GIVES), ranked, progress=0.0, key=(step,), scores=scores)
    gain = (policy.log_prob(ranked) - start).mean(dim=0)
    assert gain[0] > gain[1] > gain[2]


def test_reset_goes_back_to_the_start_bit_for_bit(make, tmp_path):
    policy, fresh = make(), make()
    pair = sample(policy, 2)
    start = weights(policy).clone()
    for step in range(3):
        policy.learn(DPO, pair, progress=0.0, key=(step,))
    policy.move_reference()
    moved = policy.reference_log_prob(pair)
    policy.save(tmp_path)
    assert not torch.equal(weights(policy), start)
    loaded = make()
    loaded.load(tmp_path)
    for one in (policy, loaded):
        one.reset()
        assert torch.equal(weights(one), start)
        assert one.gradient_steps == 3
        assert torch.equal(one.reference_log_prob(pair), moved)  # the reference stays where it was moved
    # The optimizer is new too: with the same loss a fresh policy goes the same way. SimPO looks at no reference.
    for one in (policy, loaded, fresh):
        for step in range(2):
            one.learn(direct_optimizer("simpo", 2.0), pair, progress=0.5, key=("again", step))
    assert torch.equal(weights(policy), weights(fresh))
    assert torch.equal(weights(loaded), weights(fresh))


def test_what_does_not_fit_is_refused_before_a_step(make):
    policy = make()
    pair, before = sample(policy, 2), weights(policy).clone()
    scores = np.zeros((6, 2), np.float32)
    scores[3, 1] = np.nan
    other = policy.sample(observe(policy, IDS[::-1].copy()), 1, ("x",))
    for told, message in [
        ({"ranked": sample(policy, 1)}, r"at least two responses, got \(6, 1\)"),
        ({"ranked": pair.rows(np.zeros(6, bool))}, r"at least one row .*, got \(0, 2\)"),
        ({"scores": scores}, r"scores: expected finite numbers, rows \[3\] have others"),
        ({"scores": scores[:, :1]}, r"scores: expected \(6, 2\), got \(6, 1\)"),
        ({"bonus": pair}, r"bonus: expected one response to each of the 6 prompts, in order; got \(6, 2\)"),
        ({"bonus": other}, "bonus: expected one response to each of the 6 prompts, in order"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy.learn(DPO, **{"ranked": pair, "progress": 0.0, "key": (0,), **told})
    judged = Preferences(pair, np.ones(6), np.ones(6, bool))
    with pytest.raises(ValueError, match=r"scores: expected \(6, 2\), got \(5, 2\)"):
        policy.update(DPO, judged, progress=0.0, key=(0,), scores=scores[:5])
    with pytest.raises(ValueError, match=r"bonus: expected \(6, 1\), got \(6, 2\)"):
        policy.update(DPO, judged, progress=0.0, key=(0,), bonus=pair)
    assert torch.equal(weights(policy), before)
