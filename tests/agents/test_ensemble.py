from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_duel_env.agents.reward_models.ensemble import EnsembleConfig, EnsembleRewardModel
from llm_duel_env.agents.reward_models.replay import PairBuffer
from llm_duel_env.randomness import generator

D = 6
SMALL = EnsembleConfig(members=4, hidden=8, batch=16, start=16, capacity=64)


def model(config=SMALL, seed=0, d=D):
    return EnsembleRewardModel(d, config, seed=seed)


def duels(count, seed=0, d=D):
    return torch.randn(count, 2, d, generator=torch.Generator().manual_seed(seed))


def doubled(ensemble):
    """The same ensemble in float64."""
    ensemble.weights = {n: v.detach().double().requires_grad_() for n, v in ensemble.weights.items()}
    ensemble.anchors = {n: v.double() for n, v in ensemble.anchors.items()}
    return ensemble


def members_of(ensemble):
    """Each member as a network of its own."""
    h, w = ensemble.config.hidden, ensemble.weights
    networks = []
    for e in range(ensemble.config.members):
        network = nn.Sequential(
            nn.Linear(w["w1"].shape[1], h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 1)
        ).double()
        with torch.no_grad():
            network[0].weight.copy_(w["w1"][e].T)
            network[0].bias.copy_(w["b1"][e, 0])
            network[2].weight.copy_(w["w2"][e].T)
            network[2].bias.copy_(w["b2"][e, 0])
            network[4].weight.copy_(w["w3"][e].T)
            network[4].bias.copy_(w["b3"][e, 0])
        networks.append(network)
    return networks


def moved(seed=3):
    """An ensemble away from its start, biases included, in float64."""
    ensemble = doubled(model())
    draw = torch.Generator().manual_seed(seed)
    for value in ensemble.weights.values():
        value.data += 0.1 * torch.randn(value.shape, generator=draw, dtype=torch.float64)
    return ensemble


def test_forward_equals_separate_networks():
    ensemble = moved()
    features = torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rewards = ensemble(features)
    assert rewards.shape == (4, 3, 5)
    for e, network in enumerate(members_of(ensemble)):
        torch.testing.assert_close(rewards[e], network(features)[..., 0].detach(), rtol=1e-12, atol=1e-12)


def test_objective_and_its_gradient_equal_those_of_separate_networks():
    ensemble, pairs, n = moved(), duels(7).double(), 11
    starts = members_of(started(ensemble))
    networks = members_of(ensemble)
    objective = ensemble.objective(pairs, n)
    objective.sum().backward()
    for e, (network, start) in enumerate(zip(networks, starts)):
        winner, loser = network(pairs[:, 0])[:, 0], network(pairs[:, 1])[:, 0]
        nll = torch.log1p(torch.exp(loser - winner)).mean()
        squared = sum(((p - q.detach()) ** 2).sum() for p, q in zip(network.parameters(), start.parameters()))
        expected = nll + SMALL.anchor / n * squared
        assert objective[e].item() == pytest.approx(expected.item(), rel=1e-12)
        expected.backward()
        g = {name: value.grad for name, value in ensemble.weights.items()}
        ours = [g["w1"][e].T, g["b1"][e, 0], g["w2"][e].T, g["b2"][e, 0], g["w3"][e].T, g["b3"][e, 0]]
        for parameter, gradient in zip(network.parameters(), ours):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-14)


def test_a_round_s_steps_move_each_member_as_adam_would_move_it_alone():
    ensemble, pairs, n = doubled(model(replace(SMALL, members=3))), duels(20), 20
    ensemble.optimizer = torch.optim.Adam(list(ensemble.weights.values()), lr=SMALL.learning_rate)
    networks, starts = members_of(ensemble), members_of(ensemble)
    forward = ensemble.forward
    ensemble.forward = lambda features: forward(features.double())
    ensemble.update(pairs, (0,))
    buffer, draw = PairBuffer(64, D), generator(0, "replay", 0)
    buffer.add(pairs)
    batches = [buffer.sample(SMALL.batch, draw).double() for _ in range(SMALL.steps)]
    for alone, start, found in zip(networks, starts, members_of(ensemble)):
        optimizer = torch.optim.Adam(alone.parameters(), lr=SMALL.learning_rate)
        for batch in batches:
            margin = alone(batch[:, 0]) - alone(batch[:, 1])
            squared = sum(((p - q.detach()) ** 2).sum() for p, q in zip(alone.parameters(), start.parameters()))
            optimizer.zero_grad()
            (torch.log1p(torch.exp(-margin)).mean() + SMALL.anchor / n * squared).backward()
            optimizer.step()
        for p, q, r in zip(alone.parameters(), found.parameters(), start.parameters()):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
            assert p.numel() == 1 or not torch.equal(q, r)


def test_the_pull_to_the_start_falls_with_all_labels_bought_not_with_those_still_stored():
    ensemble, told = model(replace(SMALL, capacity=16)), []
    pull = ensemble.pull
    ensemble.pull = lambda labelled: told.append(labelled) or pull(labelled)
    for r in range(3):
        ensemble.update(duels(16, r), (r,))
    assert told == [16] * SMALL.steps + [32] * SMALL.steps + [48] * SMALL.steps


def started(ensemble):
    """A stand-in whose weights are the ensemble's anchors."""
    start = doubled(model())
    start.weights = {name: value.clone().requires_grad_() for name, value in ensemble.anchors.items()}
    return start


def test_start_is_a_truncated_normal_with_the_paper_s_spread():
    ensemble = model(EnsembleConfig(), d=100)
    for name, fan_in in (("w1", 100), ("w2", 128), ("w3", 128)):
        w, std = ensemble.weights[name].detach(), 0.5 / fan_in**0.5
        assert w.abs().max() <= 2 * std * 1.0001
        # A normal cut at two of its standard deviations keeps 0.880 of one.
        assert w.std() / std == pytest.approx(0.880, abs=0.03)
    assert all(not ensemble.weights[name].any() for name in ("b1", "b2", "b3"))
    assert (ensemble(torch.randn(9, 100)).std(dim=0) > 0).all()  # members differ from the first


def test_no_step_before_enough_duels_are_stored():
    ensemble = model()
    before = ensemble(duels(3))
    metrics = ensemble.update(duels(15), (0,))
    assert metrics["stored"] == 15
    assert metrics["steps"] == 0
    assert "loss" not in metrics
    assert not ensemble.trained
    torch.testing.assert_close(ensemble(duels(3)), before, rtol=0, atol=0)
    assert ensemble.update(duels(1, 1), (1,))["steps"] == SMALL.steps
    assert ensemble.trained


def test_an_empty_round_still_trains_on_the_buffer():
    ensemble = model()
    ensemble.update(duels(20), (0,))
    metrics = ensemble.update(duels(0), (1,))
    assert metrics["steps"] == 2 * SMALL.steps
    assert "accuracy" not in metrics


def test_it_learns_a_linear_utility_and_reports_accuracy_before_training():
    truth = torch.randn(D, generator=torch.Generator().manual_seed(5))

    def labelled(seed):
        pairs = duels(64, seed)
        swap = (pairs @ truth)[:, 0] < (pairs @ truth)[:, 1]
        return torch.where(swap[:, None, None], pairs.flip(1), pairs)

    ensemble = model(replace(SMALL, capacity=4096, batch=64, steps=20))
    first = ensemble.update(labelled(0), (0,))["accuracy_of_mean"]
    for r in range(1, 12):
        last = ensemble.update(labelled(r), (r,))
    assert first < 0.75  # nothing had been learnt when it was measured
    assert last["accuracy_of_mean"] > 0.9
    assert last["accuracy"] > 0.85
    assert last["std"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    ensemble = model(replace(SMALL, start=1))
    before = {name: value.detach().clone() for name, value in ensemble.weights.items()}
    features = torch.zeros(4, 2, ensemble.weights["w1"].shape[1])
    features[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"reward model's loss is nan.*Lower reward_model\.learning_rate"):
        ensemble.update(features, ("round", 0))
    assert all(torch.equal(value, before[name]) for name, value in ensemble.weights.items())


def test_the_anchor_holds_members_near_their_starts():
    distance = []
    for anchor in (0.0, 0.05, 0.5, 5.0):
        ensemble = model(replace(SMALL, anchor=anchor, steps=200))
        distance.append(ensemble.update(duels(32), (0,))["distance"])
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.5 * distance[0]


def test_save_and_load_go_on_bit_for_bit(tmp_path):
    ensemble = model()
    for r in range(4):
        ensemble.update(duels(30, r), (r,))  # more than the buffer holds
    ensemble.save(tmp_path)
    other = model(seed=9)
    other.seed = 0  # only the stream of minibatches is the seed's; weights come from the file
    other.load(tmp_path)
    for r in range(4, 7):
        assert ensemble.update(duels(10, r), (r,)) == other.update(duels(10, r), (r,))
    for name in ensemble.weights:
        assert torch.equal(ensemble.weights[name], other.weights[name])
        assert torch.equal(ensemble.anchors[name], other.anchors[name])


def test_a_first_layer_with_its_members_side_by_side_is_read_as_well(tmp_path):
    ensemble = model()
    ensemble.update(duels(30), (0,))
    ensemble.save(tmp_path)
    tensors = load_file(tmp_path / "ensemble.safetensors")
    for name in tensors:
        if name.endswith(("w1", "b1")) and "step" not in name:
            beside = torch.cat(list(tensors[name]), dim=1)  # (D, E * H), (1, E * H)
            tensors[name] = beside[0].contiguous() if name.endswith("b1") else beside
    save_file(tensors, tmp_path / "ensemble.safetensors")
    other = model(seed=9)
    other.seed = 0
    other.load(tmp_path)
    assert ensemble.update(duels(10, 1), (1,)) == other.update(duels(10, 1), (1,))
    assert all(torch.equal(value, other.weights[name]) for name, value in ensemble.weights.items())


def test_load_refuses_another_size(tmp_path):
    model().save(tmp_path)
    with pytest.raises(ValueError, match=r"w1: expected \(4, 7, 8\), got \(4, 6, 8\)"):
        model(d=7).load(tmp_path)


def test_refusals():
    with pytest.raises(ValueError, match="positive sizes"):
        model(replace(SMALL, members=0))
    with pytest.raises(ValueError, match="anchor"):
        model(replace(SMALL, anchor=-1.0))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 6\), got \(2, 7\)"):
        model()(torch.zeros(2, 7))


def test_buffer_keeps_the_newest_and_grows():
    buffer, kept = PairBuffer(10, 2), []
    for r, count in enumerate([3, 4, 0, 9, 1, 25, 2]):
        pairs = torch.full((count, 2, 2), float(r)) + torch.arange(count)[:, None, None] / 100
        buffer.add(pairs)
        kept = [*kept, *pairs][-10:]
        assert len(buffer) == len(kept)
        stored = buffer._pairs[: len(buffer)]
        assert sorted(stored[:, 0, 0].tolist()) == sorted(float(pair[0, 0]) for pair in kept)
    assert buffer.added == 44


def test_buffer_samples_uniformly_with_replacement():
    buffer = PairBuffer(100, 1)
    buffer.add(torch.arange(5.0)[:, None, None].expand(5, 2, 1))
    drawn = buffer.sample(5000, np.random.default_rng(0))[:, 0, 0].long()
    assert (torch.bincount(drawn) / 5000).tolist() == pytest.approx([0.2] * 5, abs=0.03)


def test_buffer_refusals():
    with pytest.raises(ValueError, match="expected stored duels to sample 3 from, got an empty buffer"):
        PairBuffer(4, 2).sample(3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected \(B, 2, 2\), got \(3, 2, 5\)"):
        PairBuffer(4, 2).add(torch.zeros(3, 2, 5))
