"""LoRA policies, and reward models that are adapters."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llm_duel_env.adapters import is_adapter
from llm_duel_env.agents.losses import direct_optimizer
from llm_duel_env.agents.policies import lora
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed (make test, make test-deepspeed and the extra peft bring it)",
)
PLAIN = PolicyConfig(learning_rate=1e-2, warmup=0.0, batch=4, microbatch=3, temperature=0.9)
CONFIG = replace(PLAIN, lora_rank=4, lora_alpha=8.0)
IDS = np.array([3, 11, 3, 40, 8])
LOSS = direct_optimizer("dpo", 0.5)


def make(folder: str, config: PolicyConfig = CONFIG, seed: int = 0, **kwargs) -> LanguageModelPolicy:
    return LanguageModelPolicy(fixtures.make_view(str(folder)), config, seed=seed, device="cpu", **kwargs)


def pairs(policy, number=0):
    return policy.sample(fixtures.observe(IDS + number), 2, ("pairs", number))


def teach(policy, rounds=range(2)):
    for number in rounds:
        policy.learn(LOSS, pairs(policy, number), progress=0.0, key=("learn", number))
    return policy


@pytest.fixture(params=["llama", "qwen3"])
def folder(request, model_folder):
    return model_folder(request.param)


def test_a_fresh_adapter_changes_nothing_and_trains_alone(folder):
    policy, plain = make(folder), make(folder, PLAIN)
    assert policy.ways.share_prefix
    assert policy.ways.linear_head
    assert isinstance(policy.reference, lora.AdapterOff)
    sampled = pairs(policy)
    assert np.array_equal(sampled.tokens, pairs(plain).tokens)
    torch.testing.assert_close(policy.log_prob(sampled), plain.log_prob(sampled), rtol=1e-6, atol=1e-6)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    teach(policy)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)
    assert changed == {name for name in before if ".lora_" in name}
    assert not any("lm_head" in name for name in changed)  # all-linear leaves the output layer


def test_the_reference_is_the_base_without_a_copy_of_it(folder):
    policy, plain = teach(make(folder)), make(folder, PLAIN)
    probe = plain.sample(fixtures.observe(IDS), 4, ("probe",))
    assert not torch.allclose(policy.log_prob(probe), plain.log_prob(probe), atol=1e-2)
    torch.testing.assert_close(policy.reference_log_prob(probe), plain.log_prob(probe), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(policy.embed(probe), plain.embed(probe), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.embed_responses(probe), plain.embed_responses(probe), rtol=1e-5, atol=1e-6)
    # XPO draws from the reference: the same responses as from a frozen copy of the base.
    own, copy = (p.sample(fixtures.observe(IDS), 4, ("xpo",), reference=True) for p in (policy, plain))
    assert np.array_equal(own.tokens, copy.tokens)
    assert own.from_reference.all()
    mixed = policy.sample(fixtures.observe(IDS), 4, ("xpo",), mixture=0.5)
    assert not np.array_equal(mixed.tokens[..., :1], own.tokens[..., :1]) or mixed.tokens.shape != own.tokens.shape
    storages = {p.data_ptr() for p in policy.model.parameters()}
    assert policy.reference.get_input_embeddings().weight.data_ptr() in storages
    assert all(p.requires_grad == (".lora_" in name) for name, p in policy.model.named_parameters())


def test_the_first_weights_follow_the_seed_and_leave_the_global_generator_alone(model_folder):
    before = torch.random.get_rng_state()
    one, same, other = make(model_folder()), make(model_folder()), make(model_folder(), seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    states = [lora.state(policy.model) for policy in (one, same, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_exactly(model_folder, tmp_path):
    policy = teach(make(model_folder()))
    policy.embed(pairs(policy))
    policy.save(tmp_path)
    assert is_adapter(tmp_path / "model")
    kept = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert all("lora_" in name for name in kept)
    again = make(model_folder())
    again.load(tmp_path)
    for one in (policy, again):
        teach(one, range(2, 4))
    for (name, value), other in zip(policy.model.named_parameters(), again.model.parameters()):
        assert torch.equal(value, other), name
    (tmp_path / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        make(model_folder()).load(tmp_path)


def test_the_export_is_merged_and_ordinary(folder, tmp_path):
    policy = teach(make(folder))
    policy.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 7, 9, 20, 31]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)
    own = dict(model.named_parameters())
    sent = dict(policy.models.whole_weights())  # what a sampler in another process is sent
    assert sent.keys() == own.keys()
    for name, value in sent.items():
        torch.testing.assert_close(value, own[name].detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_reset_and_a_reference_that_moves(model_folder):
    policy = make(model_folder())
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    teach(policy)
    probe = pairs(policy)
    policy.move_reference()
    torch.testing.assert_close(policy.reference_log_prob(probe), policy.log_prob(probe), rtol=1e-5, atol=1e-5)
    moved = policy.reference_log_prob(probe)
    policy.reset()
    for name, value in policy.model.named_parameters():
        assert torch.equal(value, start[name]), name
    torch.testing.assert_close(policy.reference_log_prob(probe), moved)
    assert isinstance(policy.encoder, lora.AdapterOff)


def test_training_that_starts_from_an_adapter_keeps_a_frozen_clone(model_folder, tmp_path):
    first = teach(make(model_folder()))
    first.save(tmp_path)
    start = str(tmp_path / "model")
    policy = make(start)
    probe = pairs(first)
    assert not isinstance(policy.reference, lora.AdapterOff)
    for name, value in lora.state(policy.model).items():
        assert torch.equal(value, lora.state(first.model)[name]), name
    torch.testing.assert_close(policy.reference_log_prob(probe), first.log_prob(probe), rtol=1e-5, atol=1e-5)
    teach(policy)
    torch.testing.assert_close(policy.reference_log_prob(probe), first.log_prob(probe), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy.log_prob(probe), first.log_prob(probe), atol=1e-2)
    whole = make(start, PLAIN)  # all weights train, from base and adapter merged
    torch.testing.assert_close(whole.log_prob(probe), first.log_prob(probe), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"of the adapter that training starts from.*rank 4"):
        make(start, replace(CONFIG, lora_rank=2))


def test_modules_that_are_not_there_are_refused(model_folder):
    policy = make(model_folder(), replace(CONFIG, lora_targets="q_proj, v_proj"))
    assert {name.split(".")[-4] for name in lora.state(policy.model)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="nowhere"):
        make(model_folder(), replace(CONFIG, lora_targets="nowhere"))


def test_bf16_holds_the_frozen_weights_in_it(model_folder):
    policy = make(model_folder(), bf16=True)
    assert {p.dtype for name, p in policy.model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in lora.state(policy.model).values()} == {torch.float32}
    teach(policy)
    assert all(torch.isfinite(p).all() for p in policy.model.parameters())


def test_a_reward_model_may_be_an_adapter(tmp_path):
    import peft
    from transformers import LlamaConfig

    from llm_duel_env.oracles.reward_model import RewardModelOracle

    config = LlamaConfig(**{**fixtures.GROUPED, "eos_token_id": 2, "num_labels": 1})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_config(config)
        base.save_pretrained(tmp_path / "base")
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        wrapped = peft.get_peft_model(classifier, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"]))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "score" in name:
                torch.nn.init.normal_(parameter)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    fixtures.make_tokenizer(ends_with_eos=True).save_pretrained(tmp_path / "adapter")
    oracle = RewardModelOracle(tmp_path / "adapter", device="cpu")
    prompts, responses = {"prompt": ("w1 w2", "w3")}, np.array(["w4 w5", "w6"], object)
    got = oracle.utility(prompts, responses)
    for row, (prompt, response) in enumerate(zip(prompts["prompt"], responses)):
        with torch.no_grad():
            expected = wrapped(input_ids=torch.tensor([oracle.encode(prompt, response)])).logits[0, 0]
        assert got[row] == pytest.approx(float(expected), abs=1e-4)
    # Without the head the scores would be noise.
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None}))
    with pytest.raises(ValueError, match=r"has trained weights \['score.weight'\]"):
        RewardModelOracle(tmp_path / "adapter", device="cpu")
