from __future__ import annotations

import json

import numpy as np
import pytest

from llm_duel_env.metrics import duel_metrics
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.tiny_tldr import ASSETS, TinyTLDR

TRAIN = language.TRAIN_PROMPTS


@pytest.fixture
def assets(tmp_path):
    """A folder with stored references, as the builder writes it; the models are not needed here."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "encoder").mkdir()
    rows = [{"prompt_id": k, "prompt": language.heldout_prompt(k), "reference": f"reference {k}"} for k in range(6)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_prompts_references_and_optimum(assets):
    task = TinyTLDR(assets=str(assets))
    assert (task.train_prompts, task.heldout_prompts) == (TRAIN, 6)
    ids = np.array([0, 7, TRAIN, TRAIN + 5])
    prompts = task.observe(ids)["prompt"]
    assert prompts == (
        language.train_prompt(0), language.train_prompt(7), language.heldout_prompt(0), language.heldout_prompt(5),
    )  # fmt: skip
    assert list(task.reference(task.heldout_ids)) == [f"reference {k}" for k in range(6)]
    # Training prompts have no stored references here.
    assert list(task.reference(ids)) == [None, None, "reference 0", "reference 5"]
    assert task.reference(ids[:2]) is None
    best = np.array([language.optimum(prompt)[0] for prompt in prompts], dtype=object)
    np.testing.assert_allclose(task.truth.utility(task.observe(ids), best), task.optimum(ids))
    assert (task.optimum(ids) > 0).all()


def test_the_fingerprint_is_of_weights_and_references(assets):
    before = TinyTLDR(assets=str(assets)).fingerprint()
    assert TinyTLDR(assets=str(assets)).fingerprint() == before
    (assets / "policy" / "model.safetensors").write_bytes(b"weights")
    trained = TinyTLDR(assets=str(assets)).fingerprint()
    (assets / "references_train.jsonl").write_text("")
    assert len({before, trained, TinyTLDR(assets=str(assets)).fingerprint()}) == 3


def test_training_references_are_read_where_they_are_stored(assets):
    (assets / "references_train.jsonl").write_text(json.dumps({"prompt_id": 7, "reference": "i met bob"}) + "\n")
    task = TinyTLDR(assets=str(assets))
    assert list(task.reference(np.array([7, TRAIN]))) == ["i met bob", "reference 0"]
    assert list(task.reference(np.array([7, 8]))) == ["i met bob", None]
    assert task.reference(np.array([8, 9])) is None


def test_the_better_summary_wins_and_the_scale_is_one_of_truth_optimum_and_oracle(assets):
    task = TinyTLDR(assets=str(assets), oracle_scale=2.0)
    observation = task.observe(np.arange(5))
    best = np.array([language.optimum(p)[0] for p in observation["prompt"]], dtype=object)
    empty = np.array([""] * 5, dtype=object)
    assert (task.oracle.win_probability(observation, best, empty) > 0.5).all()
    plain = TinyTLDR(assets=str(assets))
    ids = np.arange(5)
    np.testing.assert_allclose(task.truth.utility(observation, best), 2 * plain.truth.utility(observation, best))
    np.testing.assert_allclose(task.truth.utility(observation, best), task.optimum(ids))
    # Regret is what the oracle that sells the labels would say of the best response.
    lost = duel_metrics(task, observation, empty, empty)["regret"]
    np.testing.assert_allclose(lost, 2 * task.oracle.win_probability(observation, best, empty) - 1)


def test_the_view_offers_the_editor_and_no_truth(assets):
    view = make_task("tiny_tldr", assets=str(assets)).view()
    assert view.provides == {"scores", "editor", "degrader", "contrast_prompts", "goal_prompts"}
    assert view.max_new_tokens == 28
    assert view.model == str(assets / "policy")
    prompt = view.observe(np.array([3]))["prompt"][0]
    best = language.optimum(prompt)[0]
    worse = view.degrade(prompt, best, 2)
    assert language.utility(prompt, worse) < language.utility(prompt, best)
    assert language.utility(prompt, view.edit(prompt, worse, best)) > language.utility(prompt, worse)
    with pytest.raises(ValueError, match="training prompt ids"):
        view.observe(np.array([TRAIN]))


def test_prompts_and_responses_fit_their_spaces_and_limits(assets):
    task = TinyTLDR(assets=str(assets))
    for text in task.observe(np.arange(300))["prompt"]:
        conditioned = language.with_control(text, "<good>")
        assert conditioned in task.observation_space["prompt"]
        assert len(conditioned.split()) + 1 <= 96  # with BOS
        assert language.optimum(text)[0] in task.response_space
    assert "" in task.response_space


def test_mistakes_are_refused(assets, tmp_path):
    with pytest.raises(ValueError, match="expected 'utility' or 'reward_model'"):
        TinyTLDR(oracle="length", assets=str(assets))
    with pytest.raises(FileNotFoundError, match="policy is missing"):
        TinyTLDR(assets=str(tmp_path / "absent"))
    with pytest.raises(IndexError, match="expected 0 to"):
        TinyTLDR(assets=str(assets)).observe(np.array([TRAIN + 6]))
    heldout = assets / "heldout.jsonl"
    lines = heldout.read_text().splitlines()
    heldout.write_text("\n".join([*lines[:2], lines[2].replace("tl;dr:", "tldr:")]))
    with pytest.raises(ValueError, match="row 3: its prompt is not number 2"):
        TinyTLDR(assets=str(assets))
    heldout.write_text("\n".join([lines[0], lines[2]]))
    with pytest.raises(ValueError, match="without a gap"):
        TinyTLDR(assets=str(assets))
    heldout.write_text(lines[0] + "\n" + '{"prompt_id": "x"}')
    with pytest.raises(ValueError, match="row 2: expected prompt_id"):
        TinyTLDR(assets=str(assets))


@pytest.mark.skipif(not (ASSETS / "heldout.jsonl").exists(), reason="the embedded models are not built")
def test_the_embedded_policy_writes_summaries_that_the_oracles_tell_apart():
    from llm_duel_env.agents.policies import PolicyConfig, make_policy

    task = TinyTLDR(oracle="reward_model")
    assert task.heldout_prompts >= 512
    policy = make_policy(task.view(), PolicyConfig(), seed=0)
    observation = task.observe(np.arange(16))
    candidates = policy.sample(observation, 8, ("test",), temperature=1.0)
    assert all(text in task.response_space for text in candidates.responses.ravel())
    assert policy.ways.share_prefix
    judged = [
        oracle.utility(observation, column) for oracle in (task.oracle, task.truth) for column in candidates.responses.T
    ]
    learned, true = np.array(judged[:8]), np.array(judged[8:])
    assert true.std() > 0.3
    assert np.corrcoef((learned - learned.mean(0)).ravel(), (true - true.mean(0)).ravel())[0, 1] > 0.5
    assert (true <= task.optimum(np.arange(16)) + 1e-9).all()
