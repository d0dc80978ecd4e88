import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_duel_env.agents import selection

E, M, N = 4, 6, 5


def world(seed=0, e=E, m=M, n=N, texts=3):
    """Random rewards, equal for equal texts, as an ensemble on features would give them."""
    draw = np.random.default_rng(seed)
    identity = draw.integers(texts, size=(m, n))
    by_text = draw.standard_normal((e, m, texts))
    rewards = np.take_along_axis(by_text, np.broadcast_to(identity, (e, m, n)), axis=2)
    return torch.tensor(rewards), torch.tensor(identity), torch.tensor(draw.random(m))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("seed", range(20))
def test_thompson(seed):
    rewards, _, draws = world(seed)
    heads = (draws * E).long()
    first = selection.thompson(rewards, heads)
    for m in range(M):
        assert rewards[heads[m], m, first[m]] == max(rewards[heads[m], m, n] for n in range(N))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("uncertainty", ["probability", "logit"])
def test_most_uncertain_rival_against_brute_force(seed, uncertainty):
    rewards, identity, draws = world(seed)
    first = selection.thompson(rewards, (draws * E).long())
    second = selection.most_uncertain_rival(rewards, first, selection.same_as(identity, first), draws, uncertainty)
    for m in range(M):
        value = {}
        for b in range(N):
            difference = np.array([float(rewards[e, m, first[m]] - rewards[e, m, b]) for e in range(E)])
            difference = sigmoid(difference) if uncertainty == "probability" else difference
            value[b] = difference.var(ddof=1)
        allowed = [b for b in range(N) if identity[m, b] != identity[m, first[m]]]
        if allowed:
            assert int(second[m]) in allowed
            assert value[int(second[m])] == pytest.approx(max(value[b] for b in allowed))
        else:
            assert second[m] != first[m]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("uncertainty", ["probability", "logit"])
def test_widest_variance_pair_against_brute_force(seed, uncertainty):
    rewards, identity, draws = world(seed)
    first, second = selection.widest_variance_pair(rewards, identity, draws, uncertainty)
    for m in range(M):
        value = {}
        for i, j in itertools.combinations(range(N), 2):
            difference = (rewards[:, m, i] - rewards[:, m, j]).numpy()
            value[i, j] = (sigmoid(difference) if uncertainty == "probability" else difference).var(ddof=1)
        allowed = [pair for pair in value if identity[m, pair[0]] != identity[m, pair[1]]]
        if allowed:
            assert (int(first[m]), int(second[m])) in allowed
            assert value[int(first[m]), int(second[m])] == pytest.approx(max(value[p] for p in allowed))
        assert first[m] != second[m]


@pytest.mark.parametrize("seed", range(20))
def test_second_thompson_asks_members_in_order(seed):
    rewards, identity, draws = world(seed)
    first = selection.thompson(rewards, (draws * E).long())
    orders = torch.tensor(np.random.default_rng(seed).permuted(np.tile(np.arange(E), (M, 1)), axis=1))
    second = selection.second_thompson(rewards, first, orders, selection.same_as(identity, first), draws)
    for m in range(M):
        picks = [int(rewards[e, m].argmax()) for e in orders[m]]
        different = [pick for pick in picks if identity[m, pick] != identity[m, first[m]]]
        others = [b for b in range(N) if identity[m, b] != identity[m, first[m]]]
        if different:
            assert second[m] == different[0]
        elif others:
            assert int(second[m]) in others
        else:
            assert second[m] != first[m]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), e=st.integers(1, 4), n=st.integers(2, 6), texts=st.integers(1, 4))
def test_no_rule_pairs_a_text_with_itself_while_another_exists(seed, e, n, texts):
    rewards, identity, draws = world(seed, e=e, n=n, texts=texts)
    first = selection.thompson(rewards, (draws * e).long())
    same = selection.same_as(identity, first)
    orders = torch.arange(e).expand(M, e)
    duels = [
        (first, selection.most_uncertain_rival(rewards, first, same, draws)),
        (first, selection.second_thompson(rewards, first, orders, same, draws)),
        selection.widest_variance_pair(rewards, identity, draws),
        selection.best_and_worst(rewards[0], identity, draws),
        selection.best_and_worst(torch.zeros(M, n), identity, draws),
        selection.best_pair(torch.ones(M, n, n), identity, draws),
        selection.best_pair(-selection.cosines(torch.ones(M, n, 2)), identity, draws),
        selection.two_means_medoids(rewards.permute(1, 2, 0), identity, draws[:, None].expand(M, 3)),
    ]
    varied = torch.tensor([len(set(row.tolist())) > 1 for row in identity])
    for a, b in duels:
        assert (a != b).all()
        assert ((b >= 0) & (b < n)).all()
        texts_differ = identity.gather(1, a[:, None]) != identity.gather(1, b[:, None])
        assert texts_differ[varied].all()


def test_one_member_draws_rivals_uniformly():
    m = 6000
    rewards = torch.randn(1, m, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = torch.tensor([[0, 0, 1, 2]]).expand(m, 4)
    first = torch.zeros(m, dtype=torch.int64)
    draws = torch.tensor(np.random.default_rng(0).random(m))
    same = selection.same_as(identity, first)
    orders = torch.zeros(m, 1, dtype=torch.int64)
    rewards[:, :, 0] = 9.0  # the only member always picks the first again
    for second in (
        selection.most_uncertain_rival(rewards, first, same, draws),
        selection.second_thompson(rewards, first, orders, same, draws),
    ):
        share = torch.bincount(second, minlength=4) / m
        assert share[:2].sum() == 0  # candidate 1 is the first one's text
        assert share[2:].tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    pairs = torch.stack(selection.widest_variance_pair(rewards, identity, draws), dim=1)
    seen = {tuple(pair) for pair in pairs.tolist()}
    assert seen == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}


def test_members_that_agree_draw_rivals_uniformly():
    rewards = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(1)).expand(5, 4000, 3)
    identity = torch.arange(3).expand(4000, 3)
    first = selection.thompson(rewards, torch.zeros(4000, dtype=torch.int64))
    draws = torch.tensor(np.random.default_rng(1).random(4000))
    second = selection.most_uncertain_rival(rewards, first, selection.same_as(identity, first), draws)
    assert ((second - first) % 3 == 1).double().mean() == pytest.approx(0.5, abs=0.03)


def test_a_draw_next_to_one_stays_in_range():
    rewards, identity = torch.zeros(2, 1, 3), torch.arange(3)[None]
    first, draws = torch.tensor([0]), torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert selection.most_uncertain_rival(rewards, first, selection.same_as(identity, first), draws).tolist() == [2]


def test_best_and_worst():
    rewards = torch.tensor([[0.0, 3.0, -1.0], [2.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    identity = torch.tensor([[0, 1, 2], [0, 0, 1], [5, 5, 5]])
    best, worst = selection.best_and_worst(rewards, identity, torch.tensor([0.4, 0.4, 0.4]))
    assert best.tolist() == [1, 0, 0]
    # All equal: still two different responses. All one response: still two different candidates.
    assert worst.tolist() == [2, 2, 1]


def test_best_and_worst_with_all_equal_draw_the_worst_uniformly():
    m = 4000
    draws = torch.tensor(np.random.default_rng(2).random(m))
    best, worst = selection.best_and_worst(torch.zeros(m, 4), torch.arange(4).expand(m, 4), draws)
    assert (best == 0).all()
    assert (torch.bincount(worst, minlength=4) / m).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.03)


def embeddings(seed, texts=3, n=N, d=4, bias=0.0):
    """Embeddings equal for equal texts, (M, N, D) float32, and what is equal."""
    draw = np.random.default_rng(seed)
    identity = draw.integers(texts, size=(M, n))
    by_text = (draw.standard_normal((M, texts, d)) + bias).astype(np.float32)
    return torch.tensor(by_text[np.arange(M)[:, None], identity]), torch.tensor(identity), torch.tensor(draw.random(M))


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sign", [-1, 1])
def test_least_and_most_similar_pair_against_brute_force(seed, sign):
    features, identity, draws = embeddings(seed, texts=4, bias=30.0)  # the bias: cosines all near 1, as in practice
    first, second = selection.best_pair(sign * selection.cosines(features), identity, draws)
    for m in range(M):
        value = {(i, j): cosine(features[m, i], features[m, j]) for i, j in itertools.combinations(range(N), 2)}
        allowed = [pair for pair in value if identity[m, pair[0]] != identity[m, pair[1]]]
        chosen = (int(first[m]), int(second[m]))
        if allowed:
            assert chosen in allowed
            assert sign * value[chosen] == pytest.approx(max(sign * value[pair] for pair in allowed), abs=1e-12)
        else:
            assert chosen == (0, 1)


def test_cosines_of_scaled_copies_and_of_a_zero_vector():
    found = selection.cosines(torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]]))
    assert found[0, 0].tolist() == [1, 1, 0, -1, 0]
    with pytest.raises(ValueError, match=r"features: expected \(prompts, candidates, size\)"):
        selection.cosines(torch.zeros(3, 2))


def test_equal_scores_draw_the_pair_uniformly():
    m = 6000
    draws = torch.tensor(np.random.default_rng(3).random(m))
    identity = torch.tensor([[0, 1, 1, 2]]).expand(m, 4)
    pairs = torch.stack(selection.best_pair(torch.zeros(m, 4, 4), identity, draws), dim=1)
    seen, count = np.unique(pairs.numpy(), axis=0, return_counts=True)
    assert seen.tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    assert (count / m).tolist() == pytest.approx([0.2] * 5, abs=0.03)


def scatter_of(points, members):
    """Sum of squared distances of a cluster's points to their mean."""
    cluster = points[list(members)]
    return float(((cluster - cluster.mean(axis=0)) ** 2).sum())


def best_split(points, kinds):
    """The split in two with the least sum of squares, by trying them all; responses of a kind stay together."""
    everybody = frozenset(range(len(points)))
    splits = {}
    for size in range(1, len(points)):
        for members in itertools.combinations(range(len(points)), size):
            rest = everybody - set(members)
            if {kinds[k] for k in members} & {kinds[k] for k in rest}:
                continue
            splits[frozenset(members)] = scatter_of(points, members) + scatter_of(points, rest)
    return splits


@pytest.mark.parametrize("seed", range(30))
def test_two_means_medoids_against_all_splits(seed):
    features, identity, _ = embeddings(seed, texts=5, n=6, bias=5.0)
    draws = torch.tensor(np.random.default_rng(seed).random((M, 3)))
    first, second = selection.two_means_medoids(features, identity, draws)
    for m in range(M):
        points, kinds = features[m].numpy().astype(np.float64), identity[m].tolist()
        splits = best_split(points, kinds)
        if not splits:
            assert (int(first[m]), int(second[m])) == (0, 1)
            continue
        least = min(splits.values())
        near = [split for split, scatter in splits.items() if scatter <= least * (1 + 1e-9) + 1e-12]
        fits = False
        for split in near:
            clusters = [sorted(split), sorted(set(range(6)) - split)]
            distances = [((points[c] - points[c].mean(axis=0)) ** 2).sum(axis=1) for c in clusters]
            medoids = [{c[k] for k in np.flatnonzero(d <= d.min() + 1e-9)} for c, d in zip(clusters, distances)]
            fits |= int(first[m]) in medoids[0] and int(second[m]) in medoids[1]
        assert fits, f"{first[m]}, {second[m]} are no medoids of {near}"
        assert identity[m, first[m]] != identity[m, second[m]]


def test_two_means_medoids_break_ties_by_their_draws():
    # Two clusters of two: each member is as near to the centre as the other.
    m = 4000
    features = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.0, 5.1]]]).expand(m, 4, 2)
    identity = torch.arange(4).expand(m, 4)
    draws = torch.tensor(np.random.default_rng(4).random((m, 3)))
    pairs = torch.stack(selection.two_means_medoids(features, identity, draws), dim=1).sort(dim=1).values
    seen, count = np.unique(pairs.numpy(), axis=0, return_counts=True)
    assert seen.tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert (count / m).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    again = torch.stack(selection.two_means_medoids(features, identity, draws), dim=1).sort(dim=1).values
    assert torch.equal(pairs, again)


def test_two_means_refuses_more_candidates_than_it_can_try():
    with pytest.raises(ValueError, match="expected 2 to 12 candidates, got 13"):
        selection.two_means_medoids(torch.zeros(2, 13, 3), torch.arange(13).expand(2, 13), torch.zeros(2, 3))


def test_two_means_medoids_of_equal_embeddings_are_a_random_pair_of_different_responses():
    m = 3000
    draws = torch.tensor(np.random.default_rng(5).random((m, 3)))
    pairs = selection.two_means_medoids(torch.ones(m, 3, 2), torch.tensor([[0, 0, 1]]).expand(m, 3), draws)
    seen, count = np.unique(torch.stack(pairs, dim=1).numpy(), axis=0, return_counts=True)
    assert seen.tolist() == [[0, 2], [1, 2]]
    assert (count / m).tolist() == pytest.approx([0.5, 0.5], abs=0.03)


def test_passive_ignores_rewards():
    rewards, _, _ = world()
    assert [part.tolist() for part in selection.passive(rewards)] == [[0] * M, [1] * M]


def test_identities_of_text_and_of_indices():
    texts = np.array([["a", "b", "a"], ["", "a", ""]], dtype=object)
    identity = selection.identities(texts)
    assert identity.dtype == np.int64
    for (i, j), (k, q) in itertools.product(np.ndindex(2, 3), repeat=2):
        assert (identity[i, j] == identity[k, q]) == (texts[i, j] == texts[k, q])
    assert selection.identities(np.array([[5, 5, 2]])).tolist() == [[5, 5, 2]]


def test_refusals_name_shapes():
    rewards, identity, draws = world()
    first = torch.zeros(M, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least 2 candidates per prompt, got 1"):
        selection.thompson(rewards[:, :, :1], first)
    with pytest.raises(ValueError, match=r"expected \(members, prompts, candidates\)"):
        selection.thompson(rewards[0], first)
    with pytest.raises(ValueError, match=r"heads: expected shape \(6,\), got \(2,\)"):
        selection.thompson(rewards, first[:2])
    with pytest.raises(ValueError, match="'entropy'"):
        selection.widest_variance_pair(rewards, identity, draws, "entropy")
    with pytest.raises(ValueError, match="same"):
        selection.most_uncertain_rival(rewards, first, identity[:2] == 0, draws)
