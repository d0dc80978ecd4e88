from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from llm_duel_env import packing
from llm_duel_env.packing import pack, widest

PROMPTS = [[1, 9, 8, 7], [1, 10, 11, 12, 13, 14, 15, 16, 17, 18], [1, 20], []]
LENGTHS = [[1, 5, 0], [3, 3, 6], [4, 0, 2], [6, 1, 3]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_row_is_written_as_one_would_by_hand(n):
    lengths = torch.tensor(LENGTHS)[:, :n]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 48, (len(PROMPTS), n, 6), generator=draw)
    rows = pack(PROMPTS, tokens, lengths)
    told = iter(zip(rows.row.tolist(), rows.place.tolist(), rows.before.tolist()))
    for m, prompt in enumerate(PROMPTS):
        ids, positions, owner = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k in range(n):
            answer = tokens[m, k, : lengths[m, k]].tolist()
            places = list(range(len(ids), len(ids) + len(answer)))
            before = [len(prompt) - 1, *places[:-1]]
            assert [next(told) for _ in answer] == [(m, *both) for both in zip(places, before)]
            ids += answer
            positions += range(len(prompt), len(prompt) + len(answer))
            owner += [k + 1] * len(answer)
        size = len(ids)
        assert rows.ids[m].tolist() == ids + [0] * (rows.ids.shape[1] - size)
        assert rows.positions[m, :size].tolist() == positions
        for q in range(size):
            seen = [j <= q and owner[j] in (0, owner[q]) for j in range(size)]
            assert rows.seen[m, 0, q, :size].tolist() == seen
    assert next(told, None) is None
    assert rows.seen.any(-1).all()  # a token that sees nothing would make its row NaN


def states_of(model):
    return lambda **inputs: model(**inputs, use_cache=False).last_hidden_state


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaModel(LlamaConfig(**sizes, vocab_size=48, initializer_range=0.5)).eval()


def test_a_model_is_tried(model):
    assert packing.works(model, states_of(model), tolerance=1e-5)
    model.set_attn_implementation("eager")
    assert not packing.works(model, states_of(model), tolerance=1e-5)


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_does_not_do_as_it_is_told_is_found_out(model, ignored):
    states = states_of(model)
    assert not packing.works(model, lambda **inputs: states(**{**inputs, ignored: None}), tolerance=1e-2)


def test_a_model_that_fails_or_makes_no_numbers_is_not_packed(model):
    def fails(**inputs):
        raise TypeError("no such mask")

    assert not packing.works(model, fails, tolerance=1e-2)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    assert not packing.works(model, states_of(model), tolerance=1e-2)


def test_a_row_is_no_wider_than_a_window(model):
    assert widest(model) == 2**31
    model.config.sliding_window = 64
    assert widest(model) == 64
    model.config.attention_chunk_size = 32
    assert widest(model) == 32
