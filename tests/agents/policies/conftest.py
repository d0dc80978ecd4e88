"""Tiny random models of four families, with a word-level tokenizer, in folders as users have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from llm_duel_env.tasks.base import TaskView

WORDS = [f"w{k}" for k in range(40)]
SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 5],
    "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: LlamaConfig(**{**GROUPED, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, rotary_pct=0.5),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED),
    "gemma2": lambda: Gemma2Config(**GROUPED, sliding_window=7, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, sliding_window=7, query_pre_attn_scalar=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=7),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    "{% if add_generation_prompt %} w3{% endif %}"
)


def make_tokenizer(chat: bool = False, ends_with_eos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "<x>", "<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    form = "<bos> $A <eos>" if ends_with_eos else "<bos> $A"
    core.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<end>"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(family: str, **changes):
    config = CONFIGS[family]()
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).eval()
    if family == "gemma2":
        model.set_attn_implementation("eager")  # as load_model does
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder(family, chat=False) -> path, made once per session."""
    made = {}

    def folder(family: str = "llama", chat: bool = False) -> str:
        if (family, chat) not in made:
            path = tmp_path_factory.mktemp(f"{family}_{chat}")
            make_model(family).save_pretrained(path)
            make_tokenizer(chat).save_pretrained(path)
            made[family, chat] = str(path)
        return made[family, chat]

    return folder


def prompt_text(index: int) -> str:
    return " ".join(WORDS[(index * 7 + k * k) % len(WORDS)] for k in range(4 + index % 9))


def observe(ids) -> dict:
    ids = np.asarray(ids, np.int64)
    return {"prompt_id": ids, "prompt": tuple(prompt_text(int(i)) for i in ids)}


def make_view(model: str, **changes) -> TaskView:
    fields = {
        "name": "toy", "kind": "text", "observation_space": spaces.Dict({}), "response_space": spaces.Discrete(2),
        "train_prompts": 50, "observe": observe, "model": model, "max_prompt_tokens": 24, "max_new_tokens": 10,
    }  # fmt: skip
    return TaskView(**{**fields, **changes})
