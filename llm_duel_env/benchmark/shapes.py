"""Configurations of models that are not at hand, and tiny models of the same families to try a run with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from llm_duel_env.adapters import base_model, is_adapter
from llm_duel_env.pretrained import loading
from llm_duel_env.quiet import no_progress_bars

REQUIRED = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)
"""Fields that a shape must say, where its family has them."""
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [one + two for one in LETTERS for two in LETTERS]
"""Words of one token each, behind a blank: so many that a random model seldom ends a response early."""
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32,
    "vocab_size": len(SPECIAL) + 1 + 2 * len(LETTERS) + len(WORDS),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of tiny models. The context, tied embeddings, rotary settings and windows stay the real model's."""


def config_of(name: str, shapes: dict[str, dict[str, Any]]) -> PretrainedConfig:
    """A model's configuration: its folder's, else that of `shapes`, else the hub's (or its cache's); of an adapter's
    folder the base's.

    Raises:
        ValueError: it is nowhere to be had, or the shape lacks a field or has one that the family does not know.
    """
    if is_adapter(name):
        return config_of(base_model(name), shapes)
    if Path(name).is_dir() or name not in shapes:
        try:
            with loading(name, "the configuration of"):
                return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:
            way = f"or say its fields in the --config file: shapes: {{{name}: {{{': ..., '.join(REQUIRED)}: ...}}}}"
            raise ValueError(f"{error}; {way}") from None
    fields = dict(shapes[name])
    family = fields.pop("model_type", None)
    try:
        default = AutoConfig.for_model(family)
    except (ValueError, KeyError):
        raise ValueError(f"shapes: {name}: expected a model_type that transformers knows, got {family!r}") from None
    missing = [field for field in REQUIRED[1:] if hasattr(default, field) and field not in fields]
    if missing:
        raise ValueError(f"shapes: {name}: expected {', '.join(REQUIRED)}, got no {', '.join(missing)}")
    strange = sorted(field for field in fields if not hasattr(default, field))
    if strange:
        raise ValueError(f"shapes: {name}: expected fields of {type(default).__name__}, got {', '.join(strange)}")
    try:
        return type(default)(**fields)
    except Exception as error:  # transformers' own check of types, which has a class of its own
        raise ValueError(f"shapes: {name}: {error}") from None


def tiny(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same class with the sizes of `TINY`."""
    small: Any = copy.deepcopy(config)
    grouped = (getattr(small, "num_key_value_heads", None) or small.num_attention_heads) < small.num_attention_heads
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: TINY["num_hidden_layers"]]
    for name, value in TINY.items():
        if hasattr(small, name):
            setattr(small, name, value)
    if hasattr(small, "num_key_value_heads"):
        small.num_key_value_heads = 1 if grouped else TINY["num_attention_heads"]
    small.dtype = torch.float32
    return small


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `WORDS`. Byte-level BPE, as some families' classes build their own from its vocabulary."""
    blank = "\u0120"  # how byte-level BPE writes it
    letters = [*LETTERS, blank, *(blank + one for one in LETTERS), *(blank + word for word in WORDS)]
    vocabulary = {token: k for k, token in enumerate([*SPECIAL, *letters])}
    merges = [(blank, one) for one in LETTERS] + [(blank + word[0], word[1]) for word in WORDS]
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@no_progress_bars()
def write_tiny(config: PretrainedConfig, folder: Path, *, scores: bool = False, seed: int = 0) -> str:
    """Writes a tiny random model of a configuration's family, with its tokenizer, and returns its folder.

    Args:
        config: of the real model.
        folder: to write.
        scores: a classifier with one output, not a language model.
        seed: of its weights.
    """
    small: Any = tiny(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if scores:
            small.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(small)
        else:
            model = AutoModelForCausalLM.from_config(small)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
