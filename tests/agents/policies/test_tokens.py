from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from llm_duel_env.agents.policies.tokens import Tokens, end_tokens

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)


def codec(max_prompt_tokens: int = 24, eos=(2, 5), **kwargs) -> Tokens:
    tokenizer = fixtures.make_tokenizer(**kwargs)
    return Tokens(tokenizer, eos=eos, max_prompt_tokens=max_prompt_tokens, max_new_tokens=5)


def test_a_prompt_keeps_its_bos_and_never_gets_an_eos():
    assert codec().prompt("w0 w1 w2") == (1, 6, 7, 8)
    assert codec(ends_with_eos=True).prompt("w0 w1 w2") == (1, 6, 7, 8)
    assert codec().prompt("") == (1,)


def test_a_chat_template_is_used_with_its_generation_prompt():
    assert codec(chat=True).prompt("w10 w11") == (1, 7, 16, 17, 8, 9)  # <bos> w1 ... w2 w3


def test_a_long_prompt_loses_its_beginning_but_not_its_bos():
    assert codec(max_prompt_tokens=4).prompt("w0 w1 w2 w3 w4 w5") == (1, 9, 10, 11)


def test_decoding_leaves_out_eos_and_special_tokens():
    tokens = np.array([[[6, 7, 2, 0, 0], [6, 7, 5, 0, 0]], [[2, 0, 0, 0, 0], [6, 3, 7, 8, 9]]])
    texts = codec().decode(tokens, np.array([[3, 3], [1, 5]]))
    assert texts.dtype == object
    assert texts.tolist() == [["w0 w1", "w0 w1"], ["", "w0 w1 w2 w3"]]


def test_responses_that_were_not_sampled_end_with_eos_unless_cut():
    texts = np.array([["w0 w1", "", "w0 w1 w2 w3 w4 w5"]], dtype=object)
    tokens, lengths = codec().encode_responses(["w9"], texts)
    assert lengths.tolist() == [[3, 1, 5]]
    assert tokens.tolist() == [[[6, 7, 2, 0, 0], [2, 0, 0, 0, 0], [6, 7, 8, 9, 10]]]


def test_end_tokens_are_all_that_either_names():
    tokenizer = fixtures.make_tokenizer()
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=[5, 2])) == (2, 5)
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=7)) == (2, 7)
    assert end_tokens(tokenizer, None) == (2,)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        end_tokens(tokenizer, None)


def test_useless_limits_are_refused():
    with pytest.raises(ValueError, match="got 1 and 5"):
        codec(max_prompt_tokens=1)
