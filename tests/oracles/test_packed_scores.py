from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config

from llm_duel_env.oracles import packed_scores
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.packed_scores import cut
from llm_duel_env.oracles.reward_model import RewardModelOracle

_spec = importlib.util.spec_from_file_location(
    "policy_fixtures", Path(__file__).parents[1] / "agents" / "policies" / "conftest.py"
)
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"
TEXTS = [
    (LONG, "w20 w21 w22"),
    (LONG, "w20 w21 w22 w23"),  # begins with the one before
    ("w3", "w9"),  # alone
    (LONG, ""),
    ("w5 w6 w7 w8", "w30 w31"),
    ("w5 w6 w7 w8", "w30 w31"),  # the same again
    (LONG, "w30 w20"),
    ("w5 w6 w7 w8", "<eos>"),
    ("w5 w6 w7 w8", "<pad> w3 <pad> <pad>"),
]
FAMILIES = {
    **fixtures.CONFIGS,
    "gemma3": lambda: fixtures.Gemma3TextConfig(**fixtures.GROUPED, sliding_window=64, query_pre_attn_scalar=8),
    "mistral": lambda: fixtures.MistralConfig(**fixtures.GROUPED, sliding_window=64),
    "gpt2": lambda: GPT2Config(**fixtures.SHAPE, n_embd=32, n_layer=2, n_head=4),
    "bert": lambda: BertConfig(**fixtures.SHAPE),
}


@pytest.fixture
def build(tmp_path):
    """build(family, chat=False, pad=0, **changes of the configuration) -> a reward model's folder."""

    def make(family="llama", chat=False, pad=0, **changes):
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        config = FAMILIES[family]()
        config.num_labels, config.pad_token_id = 1, pad
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        fixtures.make_tokenizer(chat).save_pretrained(folder)
        return folder

    return make


def alone(folder, rows):
    """The score that the model itself gives to each row, with no padding and none of the oracle's code."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return np.array([float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows])


def watch(oracle):
    """The shape of the ids in each call of a body, from now on."""
    shapes = []
    for model in oracle.models:
        model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
            with_kwargs=True,
        )
    return shapes


def utility(oracle, texts=TEXTS):
    prompts, responses = zip(*texts)
    return oracle.utility({"prompt": prompts}, np.array(responses, object))


def check(oracle, folder, texts=TEXTS):
    expected = alone(folder, [oracle.encode(*text) for text in texts])
    np.testing.assert_allclose(utility(oracle, texts), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    return expected


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma2", "bert")])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_scores_in_one_row_are_those_of_one_text_at_a_time(build, family, chat, pad):
    folder = build(family, chat=chat, pad=pad)
    oracle = RewardModelOracle(folder)
    assert oracle.packs
    shapes = watch(oracle)
    expected = check(oracle, folder)
    assert len(shapes) == 2
    assert shapes[1][0] == 1  # what is alone
    assert shapes[0][0] == 2  # a row for each prompt with several responses
    assert oracle.rows_scored == 8
    assert len(set(expected.round(5))) >= 6  # texts that differ in what the model reads
    assert np.ptp(expected) > 0.1


def test_a_batch_of_texts_that_share_nothing_is_what_the_model_pads(build, monkeypatch):
    folder = build()
    oracle = RewardModelOracle(folder)
    monkeypatch.setattr(packed_scores, "scores", None)
    check(oracle, folder, [(f"w{k} w{k}", "w3 w4 w5"[: 3 * k - 1]) for k in (1, 2, 3)])


def test_a_model_that_sees_what_comes_after_is_not_packed(build):
    folder = build("bert")
    oracle = RewardModelOracle(folder)
    assert not oracle.packs
    shapes = watch(oracle)
    check(oracle, folder)
    assert shapes == [(8, max(len(oracle.encode(*text)) for text in TEXTS))]


def test_a_model_with_another_attention_is_not_packed(build):
    folder = build("gemma2")
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert not packed_scores.works(model, tolerance=1e-2)


def test_a_model_with_a_window_shorter_than_a_text_is_not_packed(build):
    folder = build("mistral", sliding_window=7)
    oracle = RewardModelOracle(folder)
    assert not oracle.packs
    check(oracle, folder)


def test_a_row_is_no_longer_than_a_window(build):
    folder = build("mistral", sliding_window=20)
    oracle = RewardModelOracle(folder)
    assert oracle.packs
    shapes = watch(oracle)
    check(oracle, folder)
    assert all(width <= 20 for _, width in shapes)
    assert 3 < sum(rows for rows, _ in shapes) < 8  # some texts of the long prompt go together, not all
    check(oracle, folder, [("w3 " * 30, "w4"), ("w5 w6 w7", "w8"), ("w5 w6 w7", "w9")])  # one is longer than the window


@pytest.mark.parametrize("pooling", ["mean", "first", "last_with_padding"])
def test_a_model_that_reads_its_score_elsewhere_is_found_out(build, monkeypatch, pooling):
    model = AutoModelForSequenceClassification.from_pretrained(build()).eval()
    assert packed_scores.works(model, tolerance=1e-4)

    def forward(input_ids, **kwargs):
        values = model.score(model.base_model(input_ids, **kwargs).last_hidden_state)
        pooled = {"mean": values.mean(1), "first": values[:, 0], "last_with_padding": values[:, -1]}[pooling]
        return type("Output", (), {"logits": pooled})

    monkeypatch.setattr(model, "forward", forward)
    assert not packed_scores.works(model, tolerance=1e-2)


def test_a_model_without_a_known_head_is_not_packed(build):
    model = AutoModelForSequenceClassification.from_pretrained(build()).eval()
    model.head = model.score
    del model.score
    assert not packed_scores.works(model, tolerance=1e-2)


@pytest.mark.parametrize("tokens", [1, 20, 30, 40, 10_000])
def test_calls_stay_within_the_tokens_allowed(build, tokens):
    folder = build()
    oracle = RewardModelOracle(folder, batch_tokens=tokens)
    shapes = watch(oracle)
    check(oracle, folder)
    assert all(rows == 1 or rows * width <= tokens for rows, width in shapes)
    longest = max(len(oracle.encode(*text)) for text in TEXTS)
    assert all(width <= max(tokens, longest) for _, width in shapes)
    assert sum(rows for rows, _ in shapes) == {1: 8, 10_000: 3}.get(tokens, sum(rows for rows, _ in shapes))


def test_copies_on_two_devices_score_alike(build):
    folder = build()
    oracle = RewardModelOracle(folder, device="cpu,cpu")
    shapes = watch(oracle)
    check(oracle, folder)
    assert len(shapes) >= 2
    assert sum(rows for rows, _ in shapes) < 8


def test_two_texts_go_to_two_devices_each(build):
    oracle = RewardModelOracle(build(), device="cpu,cpu")
    shapes = watch(oracle)
    utility(oracle, TEXTS[:2])
    assert [rows for rows, _ in shapes] == [1, 1]


def test_a_text_cut_at_its_beginning_is_scored_right(build):
    folder = build()
    oracle = RewardModelOracle(folder, max_length=16)
    expected = check(oracle, folder)
    assert len(oracle.encode(*TEXTS[0])) == len(oracle.encode(*TEXTS[1])) == 16
    assert expected[0] != expected[1]


@pytest.mark.parametrize("sick", ["w20", "w30"])
def test_a_nan_score_names_the_text_that_it_is_of(build, sick):
    oracle = RewardModelOracle(build())
    assert oracle.packs
    with torch.no_grad():
        oracle.model.base_model.embed_tokens.weight[oracle.tokenizer.convert_tokens_to_ids(sick)] = float("nan")
    texts = [(LONG, "w9 w20"), (LONG, "w9 w30"), (LONG, "w9 w8 w7")]
    with pytest.raises(OracleError, match=f"finite score, got nan.*response 'w9 {sick}'"):
        utility(oracle, texts)
    assert np.isfinite(utility(oracle, texts[2:])).all()


def ids(*sizes, first=100):
    """Texts of one prompt, as (how many tokens of it, how many of the response)."""
    return [[*range(prompt), *range(first * (k + 1), first * (k + 1) + own)] for k, (prompt, own) in enumerate(sizes)]


def test_texts_are_cut_into_pieces_that_pay():
    def sizes(rows, padding=None, hidden_size=64, widest=1000):
        pieces = cut(rows, padding, hidden_size, widest)
        assert [row for piece in pieces for row in piece.rows] == rows
        for piece in pieces:
            if len(piece.rows) == 1:
                assert piece.width == len(piece.rows[0])
            else:
                assert len({tuple(row[: piece.prefix]) for row in piece.read}) == 1
                assert all(len(row) > piece.prefix for row in piece.read)
                least = piece.prefix + sum(len(row) - piece.prefix for row in piece.read)
                assert least <= piece.width <= widest
        return [len(piece.rows) for piece in pieces]

    assert sizes(ids((30, 5), (30, 9))) == [2]
    assert sizes(ids((30, 5))) == [1]
    assert sizes(ids((0, 5), (0, 9))) == [1, 1]  # nothing in common
    assert sizes(ids((1, 80), (1, 80))) == [1, 1]  # one token saved, and attention over twice the width
    assert sizes(ids((1, 80), (1, 80)), hidden_size=4096) == [2]
    assert sizes(ids((30, 5), (30, 5), (30, 5), (30, 5)), widest=40) == [2, 2]
    assert sizes(ids((30, 5), (30, 5)), widest=39) == [1, 1]
    assert sizes(ids((30, 5), (30, 5)), widest=0) == [1, 1]
    assert sizes(ids((30, 5)) * 2) == [2]
    assert sizes(ids((30, 0), (30, 4))) == [2]  # one begins with the other


def test_what_is_behind_the_score_is_not_read():
    (piece,) = cut([[5, 6, 7, 2, 2], [5, 6, 8, 9, 2], [5, 6, 7]], 2, hidden_size=64, widest=100)
    assert piece.read == [[5, 6, 7], [5, 6, 8, 9], [5, 6, 7]]
    assert piece.prefix == 2
    (piece,) = cut([[2, 2, 2]], 2, hidden_size=64, widest=100)
    assert piece.read == [[2]]  # as a model does where all is padding
