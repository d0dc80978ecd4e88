"""The embedded TinyTLDR assets do what their README claims, on a subsample and with margins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import llm_duel_env.assets
from llm_duel_env.assets.tiny_measure import measure_policy, measure_reward_model, sample, score
from llm_duel_env.tasks import tiny_language as language

ROOT = Path(llm_duel_env.assets.__file__).parent / "tiny_tldr"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "policy")


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(ROOT / "policy").eval()


@pytest.fixture(scope="module")
def reward_model():
    return AutoModelForSequenceClassification.from_pretrained(ROOT / "reward_model").eval()


@pytest.fixture(scope="module")
def heldout():
    lines = (ROOT / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_assets_are_small_and_ordinary_folders():
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    for folder in ("policy", "encoder", "reward_model"):
        names = {path.name for path in (ROOT / folder).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (ROOT / "policy" / "generation_config.json").exists()
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}


def test_the_policy_is_of_the_promised_size(policy):
    config = policy.config
    assert 0.6e6 <= sum(p.numel() for p in policy.parameters()) <= 1.0e6
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (128, 4, 32)
    assert config.tie_word_embeddings
    generation = policy.generation_config
    assert (generation.do_sample, generation.temperature, generation.max_new_tokens) == (True, 1.0, 28)
    assert not generation.top_k  # nothing cuts the tail: samples are the policy's own


def test_heldout_prompts_are_the_languages_and_carry_a_reference(heldout):
    assert len(heldout) >= 512
    assert [row["prompt"] for row in heldout] == [language.heldout_prompt(k) for k in range(len(heldout))]
    assert [row["prompt_id"] for row in heldout] == list(range(len(heldout)))
    assert all(len(row["reference"].split()) <= language.MAX_WORDS + 1 for row in heldout)
    train = {language.train_prompt(k) for k in range(language.TRAIN_PROMPTS)}
    assert not train & {row["prompt"] for row in heldout}


def test_text_round_trips_through_the_tokenizer(tokenizer, heldout):
    for row in heldout[:100]:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]
        words = tokenizer(row["reference"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(words, skip_special_tokens=True) == row["reference"]
        assert tokenizer.unk_token_id not in ids + words


def test_control_tokens_are_single_tokens(tokenizer):
    for token in language.CONTROL_TOKENS:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert ids[0] != tokenizer.unk_token_id


@pytest.mark.parametrize("text", ["", "你好 🙂", "zzz Tom", "tl;dr:"])
def test_any_text_is_a_prompt(tokenizer, policy, reward_model, text):
    assert len(sample(policy, tokenizer, [text], 2, seed=0)[0]) == 2
    assert np.isfinite(score(reward_model, tokenizer, [text], [text])).all()


def test_generate_needs_no_arguments(tokenizer, policy, heldout):
    batch = tokenizer([heldout[0]["prompt"], heldout[1]["prompt"]], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = policy.generate(**batch)
    assert output.shape[1] <= batch["input_ids"].shape[1] + 28


def test_samples_depend_on_the_seed_alone(tokenizer, policy, heldout):
    prompts = [row["prompt"] for row in heldout[:8]]
    assert sample(policy, tokenizer, prompts, 4, seed=1) == sample(policy, tokenizer, prompts, 4, seed=1)
    assert sample(policy, tokenizer, prompts, 4, seed=1) != sample(policy, tokenizer, prompts, 4, seed=2)


@pytest.mark.slow
def test_the_policy_can_do_the_task_and_mostly_does_not(tokenizer, policy, heldout):
    # Prompts that the build did not measure (its table is of the first 256), and wider margins: the sample is small.
    measured = measure_policy(policy, tokenizer, [row["prompt"] for row in heldout[256:280]], seed=0)
    assert measured["stated_facts_in_post"] >= 0.88
    assert measured["best_of_64_reaches_90_percent"] >= 0.7
    assert measured["distinct_of_20"] >= 10
    assert measured["mean_utility"] < 0.6 * measured["mean_optimum"]
    assert 0.7 < measured["utility_std_within_prompt"] < 1.5
    assert measured["mean_utility_good"] > measured["mean_utility"] > measured["mean_utility_bad"]


@pytest.mark.slow
def test_the_reward_model_agrees_with_the_utility(tokenizer, policy, reward_model, heldout):
    measured = measure_reward_model(policy, reward_model, tokenizer, [r["prompt"] for r in heldout[256:280]], seed=0)
    assert measured["duel_agreement"] >= 0.87
    assert measured["duel_agreement_good"] >= 0.75


def test_rewards_do_not_depend_on_the_batch(tokenizer, reward_model, heldout):
    prompts, references = [r["prompt"] for r in heldout[:16]], [r["reference"] for r in heldout[:16]]
    together = score(reward_model, tokenizer, prompts, references)
    alone = [score(reward_model, tokenizer, [p], [r])[0] for p, r in zip(prompts, references)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


REQUIRED = {
    "stated_facts_in_post": 0.9,
    "distinct_of_20": 10,
    "best_of_64_reaches_90_percent": 0.8,
    "duel_agreement": 0.9,
}


@pytest.mark.parametrize("key", REQUIRED)
def test_the_measured_table_meets_the_requirement(key):
    measured = json.loads((ROOT / "measured.json").read_text(encoding="utf-8"))
    assert measured[key] >= REQUIRED[key]
