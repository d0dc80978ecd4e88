"""TinyTLDR's tokenizer and untrained policy."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_duel_env.tasks import tiny_language as language
from llm_duel_env.tasks.tiny_words import CONTROL_TOKENS, vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS = 0, 1, 2
ROPE_THETA = 1e6
"""Slow rotary frequencies: most coordinates of a head hardly turn over a post, so tokens can be matched in them."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words are what whitespace separates; a prompt gets <bos> and no <eos>."""
    words = [*SPECIAL, *CONTROL_TOKENS, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **names,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_policy(vocabulary_size: int) -> LlamaForCausalLM:
    """An untrained policy. Head size 32 and a vocabulary padded to a multiple of 16, as inference engines like it."""
    config = LlamaConfig(
        vocab_size=math.ceil(vocabulary_size / 16) * 16,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.04,
        attention_dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    plant_copying(model)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=language.MAX_WORDS + 1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return model


@torch.no_grad()
def plant_copying(model: LlamaForCausalLM) -> None:
    """Starts the first two layers as the circuit that copies: who was followed by whom, before any training.

    Left to itself a model this small needs thousands of steps to find it. Head 0 of layer 0 looks one token back (a
    constant in the embeddings, turned by one position of the rotary frequencies) and writes that token's code beside
    the token; head 0 of layer 1 looks for a token whose predecessor is the current one and proposes it. All else stays
    random, and everything is trained from there.
    """
    half = 16  # pairs of rotary coordinates (i, i + 16) in a head of 32
    frequency = ROPE_THETA ** (-torch.arange(half) / half)
    fast, slow = torch.arange(0, 5), torch.arange(5, half)  # fast ones tell positions apart, slow ones barely turn
    coordinates = torch.cat([slow, slow + half])
    codes = len(coordinates)
    content = slice(1, 128 - codes)  # the embeddings' own coordinates; 0 is the constant, the last hold the code
    embedding = model.model.embed_tokens.weight
    spread = 0.06
    embedding.mul_(spread / embedding.std())
    embedding[:, 0] = 4 * spread
    embedding[:, 128 - codes :] = 0.0
    width = 128 - codes - 1
    code = torch.randn(codes, width) / math.sqrt(width)

    for layer in model.model.layers:  # the random rest starts quietly, or it would drown the code
        layer.mlp.down_proj.weight.mul_(0.3)
        layer.self_attn.o_proj.weight.mul_(0.3)
    look, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for weight in (look.q_proj, look.k_proj, look.v_proj, match.q_proj, match.k_proj):
        weight.weight[:32] = 0.0
    look.k_proj.weight[fast, 0] = 3.0
    look.q_proj.weight[fast, 0] = 3.0 * torch.cos(frequency[fast])
    look.q_proj.weight[fast + half, 0] = -3.0 * torch.sin(frequency[fast])
    look.v_proj.weight[:codes, content] = code
    look.o_proj.weight[:, :32] = 0.0
    look.o_proj.weight[128 - codes :, :codes] = 4 * spread * torch.eye(codes)
    match.q_proj.weight[coordinates, content] = 4.0 * code
    match.k_proj.weight[coordinates, 128 - codes :] = torch.eye(codes)
    shown = torch.randn(32, width) / math.sqrt(width)
    match.v_proj.weight[:32] = 0.0
    match.v_proj.weight[:32, content] = shown
    match.o_proj.weight[:, :32] = 0.0
    match.o_proj.weight[content, :32] = 6 * spread * shown.T
