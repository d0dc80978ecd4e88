import itertools
import json

import numpy as np
import pytest
import torch

from llm_duel_env.agents.base import config_from
from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.response_embedding import mean_hidden_states
from llm_duel_env.agents.real import REAL, REALConfig
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.synthetic import Synthetic
from llm_duel_env.tasks.text import Text
from llm_duel_env.types import Candidates


@pytest.fixture(scope="module")
def task():
    return Synthetic(candidates=10, train_prompts=128, heldout_prompts=32)


@pytest.fixture(scope="module")
def text():
    """The tiny language model's policy, and candidates that it sampled: (3, 4)."""
    view = make_task("tiny_tldr").view()
    policy = make_policy(view, PolicyConfig(temperature=1.0), seed=0)
    return policy, policy.sample(view.observe(np.arange(3)), 4, ("test",))


def real(task, **changes):
    return REAL(task.view(), config_from(REALConfig, changes), seed=0, budget=100)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_the_embedding_of_text_is_the_mean_over_the_response_s_own_tokens_run_alone(text):
    policy, candidates = text
    found = policy.embed_responses(candidates)
    for m, n in np.ndindex(candidates.shape):
        ids = torch.from_numpy(candidates.tokens[m, n, : candidates.lengths[m, n]])[None]
        with torch.no_grad():
            states = policy.encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(found[m, n], states[0].mean(dim=0), atol=1e-4, rtol=1e-4)
    assert len(set(candidates.lengths.ravel().tolist())) > 1  # so padding was there to be left out


def test_neither_padding_nor_the_prompt_changes_an_embedding(text):
    policy, candidates = text
    found = policy.embed_responses(candidates)
    noise = np.where(np.arange(candidates.tokens.shape[2]) < candidates.lengths[..., None], candidates.tokens, 7)
    wider = np.pad(noise, ((0, 0), (0, 0), (0, 5)), constant_values=3)
    other = policy.task.observe(np.array([11, 12, 13]))
    moved = Candidates(other, candidates.responses, wider, candidates.lengths)
    torch.testing.assert_close(policy.embed_responses(moved), found, atol=1e-4, rtol=1e-4)
    # The features that reward models learn from do see the prompt.
    assert not torch.allclose(
        policy.embedder.raw(policy._prompts(other), *policy._tensors(candidates)),
        policy.embedder.raw(policy._prompts(candidates.observation), *policy._tensors(candidates)),
        atol=1e-3,
    )


def test_the_embedding_is_the_supervised_model_s_however_the_policy_moves(text):
    policy, candidates = text
    before = policy.embed_responses(candidates)
    kept = [p.detach().clone() for p in policy.model.parameters()]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(policy.embed_responses(candidates), before)
    with torch.no_grad():
        for parameter, value in zip(policy.model.parameters(), kept):
            parameter.copy_(value)


def test_impossible_lengths_are_refused(text):
    policy, _ = text
    with pytest.raises(ValueError, match="lengths: expected 1 to 4, got 0 to 5"):
        mean_hidden_states(policy.encoder, torch.zeros(1, 2, 4, dtype=torch.long), torch.tensor([[0, 5]]))


def test_the_embedding_on_a_finite_task_is_the_candidate_s_own_vector(task):
    policy = real(task).policy
    observation = task.observe(np.array([3, 8]))
    candidates = Candidates(observation, np.array([[0, 4, 4], [9, 1, 2]]))
    expected = observation["candidates"][np.arange(2)[:, None], candidates.responses]
    np.testing.assert_array_equal(policy.embed_responses(candidates).numpy(), expected)


@pytest.mark.parametrize(("rule", "sign"), [("dissimilar", 1), ("similar", -1)])
def test_the_pair_shown_is_the_extreme_one_among_different_candidates(task, rule, sign):
    agent, observation = real(task, rule=rule), task.observe(np.arange(40))
    duels = agent.act(observation)
    candidates = agent.policy.sample(observation, 4, ("act", 0), reference=True)
    for m in range(40):
        vectors, drawn = observation["candidates"][m], candidates.responses[m]
        value = {
            frozenset((int(a), int(b))): cosine(vectors[a], vectors[b])
            for a, b in itertools.combinations(drawn, 2)
            if a != b
        }
        assert frozenset(duels.pair.responses[m].tolist()) in value  # never a response against itself
        assert value[frozenset(duels.pair.responses[m].tolist())] == pytest.approx(
            sign * min(sign * v for v in value.values()), abs=1e-9
        )
    assert duels.query.all()


def test_random_pairs_are_no_more_alike_than_candidates_are(task):
    observation, mean = task.observe(np.arange(128)), {}
    for rule in ("dissimilar", "centroid", "similar", "random"):
        agent = real(task, rule=rule)
        agent.act(observation)
        mean[rule] = agent._metrics["cosine"]
    assert mean["dissimilar"] < mean["centroid"] < mean["random"] < mean["similar"]


def test_offline_pairs_are_the_reference_s_and_online_pairs_the_policy_s(task):
    observation = task.observe(np.arange(16))
    for offline in (True, False):
        agent = real(task, offline=offline)
        before = agent.act(observation)
        assert (before.pair.from_reference is not None and before.pair.from_reference.all()) == offline
        with torch.no_grad():
            agent.policy.scorer.out.add_(3.0)
        same = (agent.act(observation).pair.responses == before.pair.responses).all()
        assert same == offline


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Text with three recorded responses to each prompt, two of them alike."""
    tiny = make_task("tiny_tldr")
    posts, rows = tiny.view().observe(np.arange(24))["prompt"], []
    for post in posts:
        said = post.split(" . ")
        rows.append({"prompt": post, "reference": said[0], "responses": [said[0], said[0] + " today", "no no no"]})
    path = tmp_path_factory.mktemp("real") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Text(tiny.view().model, tiny.oracle, prompts=str(path), heldout=4, max_prompt_tokens=96, max_new_tokens=28)


@pytest.mark.parametrize("rule", ["dissimilar", "similar"])
def test_given_pairs_are_of_the_recorded_responses_chosen_by_brute_force(recorded, rule):
    agent, observation = real(recorded, given=True, rule=rule), recorded.observe(np.arange(6))
    duels = agent.act(observation)
    texts = recorded.given(observation)
    features = agent.policy.embed_responses(agent.policy.from_text(observation, texts))
    sign = 1 if rule == "dissimilar" else -1
    for m in range(6):
        value = {
            frozenset((texts[m, a], texts[m, b])): sign * cosine(features[m, a], features[m, b])
            for a, b in itertools.combinations(range(3), 2)
        }
        assert frozenset(duels.pair.responses[m]) == min(value, key=value.get)
    assert agent.update(duels.judged(np.ones(6, np.float32)))["loss"] > 0


def test_given_pairs_need_recorded_responses_and_do_not_follow_the_policy(task, recorded):
    with pytest.raises(ValueError, match="expected a task with recorded responses"):
        real(task, given=True)
    with pytest.raises(ValueError, match="expected offline=True"):
        real(recorded, given=True, offline=False)


def test_of_the_prompts_the_share_kept_is_labelled_and_it_is_the_most_dissimilar(task):
    agent, observation = real(task, kept=0.5, candidates=2), task.observe(np.arange(41))
    duels = agent.act(observation)
    value = []
    for m, (a, b) in enumerate(duels.pair.responses):
        vectors = observation["candidates"][m]
        value.append(np.inf if a == b else cosine(vectors[a], vectors[b]))
    assert duels.query.sum() == 21
    assert max(np.array(value)[duels.query]) <= min(np.array(value)[~duels.query])
    assert np.isnan(duels.synthetic).all()


def test_one_response_only_is_a_clash_that_costs_nothing(task):
    agent = real(task)
    cosines = torch.ones(3, 2, 2, dtype=torch.float64)
    kept = agent.keep(cosines[:, 0, 1], torch.tensor([True, False, True]), torch.tensor([0.1, 0.9, 0.5]))
    assert kept.tolist() == [True, True, True]
    agent = real(task, kept=0.3)
    kept = agent.keep(cosines[:, 0, 1], torch.tensor([True, False, True]), torch.tensor([0.1, 0.9, 0.5]))
    assert kept.tolist() == [False, True, False]


def test_refusals_and_defaults(task):
    for wrong, said in (
        ({"rule": "alike"}, "rule: expected one of"),
        ({"candidates": 1}, "candidates >= 2"),
        ({"kept": 0.0}, r"kept in \(0, 1\]"),
        ({"rule": "centroid", "candidates": 13}, "at most 12 candidates, got 13"),
    ):
        with pytest.raises(ValueError, match=said):
            real(task, **wrong)
    config = REALConfig()
    assert (config.rule, config.candidates, config.offline, config.loss, config.beta) == (
        "dissimilar", 4, True, "dpo", 0.1,
    )  # fmt: skip
