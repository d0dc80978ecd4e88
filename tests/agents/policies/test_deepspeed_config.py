from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.deepspeed_config import filled, read_config

CONFIG = PolicyConfig(learning_rate=1e-4, batch=12, microbatch=2, grad_clip=0.7, betas=(0.8, 0.9), weight_decay=0.1)


def fill(document, config=CONFIG, world=2, **kwargs):
    return filled(document, config, world=world, hidden_size=10, **kwargs)


def test_what_is_missing_or_auto_is_the_policys():
    document = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "offload_optimizer": {"device": "cpu"},
        },
    }
    before = json.dumps(document)
    result = fill(document, bf16=True)
    assert json.dumps(document) == before
    assert "train_batch_size" not in result
    assert result["train_micro_batch_size_per_gpu"] == 2
    assert result["gradient_accumulation_steps"] == 3  # a rank's six rows, two at a time
    assert result["gradient_clipping"] == 0.7
    assert result["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.8, 0.9], "weight_decay": 0.1}
    assert result["bf16"] == {"enabled": True}
    assert result["fp16"] == {"enabled": False}
    assert result["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "stage3_prefetch_bucket_size": 90,
        "stage3_param_persistence_threshold": 100,
        "offload_optimizer": {"device": "cpu"},
    }
    assert "zero_allow_untested_optimizer" not in result


def test_without_an_optimizer_torchs_is_allowed():
    result = fill({}, world=1)
    assert result["zero_optimization"]["stage"] == 2
    assert result["zero_allow_untested_optimizer"] is True
    assert result["zero_force_ds_cpu_optimizer"] is False  # no g++ for its own CPU Adam
    assert result["gradient_accumulation_steps"] == 6


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"train_batch_size": 64}, r"train_batch_size: expected 12 \(policy.batch\) or 'auto', got 64"),
        ({"train_micro_batch_size_per_gpu": 1}, "policy.microbatch"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: expected 3"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping: expected 0.7 \(policy.grad_clip\)"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr: expected 0.0001"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.9]}}}, "policy.betas"),
        ({"optimizer": {"type": "Lamb"}}, "expected AdamW, got 'Lamb'"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule of its own"),
        ({"fp16": {"enabled": True}}, "bf16 or float32"),
        ({"zero_optimization": {"stage": 0}}, "expected 1, 2 or 3, got 0"),
        ({"zero_optimization": {"sub_group_size": "auto"}}, "zero_optimization.sub_group_size: 'auto'"),
    ],
)
def test_contradictions_are_refused(document, message):
    with pytest.raises(ValueError, match=message):
        fill(document)


def test_a_share_smaller_than_a_microbatch_and_no_clipping():
    result = fill({}, replace(CONFIG, microbatch=64, grad_clip=math.inf), world=5)
    assert result["train_micro_batch_size_per_gpu"] == 3  # the rank with most rows has three of twelve
    assert result["gradient_accumulation_steps"] == 1
    assert result["gradient_clipping"] == 0.0


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "examples" / "deepspeed").glob("*.json")))
def test_the_examples_are_complete(path):
    result = fill(read_config(str(path)), bf16=True)
    assert result["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(result)


def test_files(tmp_path):
    assert read_config(None) == {"zero_optimization": {"stage": 2}}
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert read_config(str(path)) == {"zero_optimization": {"stage": 1}}
    for text, message in (("[1]", "expected a JSON object"), ("{", "expected a DeepSpeed JSON file")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(str(path))
    with pytest.raises(ValueError, match="expected a DeepSpeed JSON file"):
        read_config(str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "jax"}, "policy.learner: expected torch or deepspeed, got 'jax'"),
        ({"deepspeed_config": "x.json"}, "policy.learner=deepspeed"),
        ({"lora_rank": -1}, "policy.lora_rank"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**changes)
