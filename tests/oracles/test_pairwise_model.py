"""Pairwise models: a classifier and a PairRM of random weights, against the plain computation."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, PreTrainedTokenizerFast

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.pairrm import PairRM, pairrm_ids
from llm_duel_env.oracles.pairwise_model import PairwiseModelOracle

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|source|>", "<|candidate1|>", "<|candidate2|>", *"abcdefgh|"]
PROMPTS = {"prompt": ("a b", "c", "a b c d"), "prompt_id": np.arange(3)}
FIRST = np.array(["d e f", "a", "h"], object)
SECOND = np.array(["g", "a b c d e", "h h"], object)
TEMPLATE = "{prompt} | {first} | {second}"


def save_tokenizer(folder):
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=64, **special).save_pretrained(folder)


@pytest.fixture
def classifier(tmp_path):
    def make(labels=1, poison=None):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_labels=labels, pad_token_id=0, initializer_range=0.5, max_position_embeddings=64,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        if poison is not None:
            with torch.no_grad():
                model.bert.embeddings.word_embeddings.weight[WORDS.index(poison)] = float("nan")
        model.save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        return tmp_path

    return make


@pytest.fixture
def pairrm(tmp_path):
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, initializer_range=0.5, max_position_embeddings=64, type_vocab_size=0, relative_attention=True,
        pos_att_type="p2c|c2p", position_biased_input=False,
        source_prefix_id=4, cand1_prefix_id=5, cand2_prefix_id=6, n_tasks=3, drop_out=0.1,
    )  # fmt: skip
    PairRM(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"architectures": ["DebertaV2PairRM"]}))
    save_tokenizer(tmp_path)
    return tmp_path


def ids(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_is_asked_in_both_orders(classifier, labels):
    oracle = PairwiseModelOracle(classifier(labels), text_template=TEMPLATE)
    rows = [ids(f"{p} | {a} | {b}") for p, a, b in zip(PROMPTS["prompt"], FIRST, SECOND)]
    turned = [ids(f"{p} | {b} | {a}") for p, a, b in zip(PROMPTS["prompt"], FIRST, SECOND)]
    expected = expit((alone(oracle, rows) - alone(oracle, turned)) / 2)
    found = oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.ptp(found) > 0.01
    assert oracle.win_probability(PROMPTS, SECOND, FIRST) == pytest.approx(1 - found, abs=1e-9)
    assert oracle.rows_scored == 6  # the second time all was known
    assert not oracle.has_utility


def alone(oracle, rows):
    """The model's own output for each row, one at a time and without padding."""
    with torch.inference_mode():
        outs = [oracle.model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    return np.array([float(out[0] - out[1]) if len(out) == 2 else float(out[0]) for out in outs])


def plain_pairrm(model, row):
    """PairRM's formula on one row, written out."""
    with torch.inference_mode():
        states = model.pretrained_model(input_ids=torch.tensor([row])).last_hidden_state[0]
        source, one, two = (states[row.index(marker)] for marker in (4, 5, 6))
        first, second = (model.head_layer(torch.cat([source, state])) for state in (one, two))
    return float((first - second).mean())


def test_pairrm_reads_three_markers(pairrm):
    oracle = PairwiseModelOracle(pairrm)
    assert isinstance(oracle.model, PairRM)
    assert not oracle.model.training
    rows = [
        ids(f"[CLS] <|source|> {p} [SEP] [CLS] <|candidate1|> {a} [SEP] [CLS] <|candidate2|> {b} [SEP]")
        for p, x, y in zip(PROMPTS["prompt"], FIRST, SECOND)
        for a, b in ((x, y), (y, x))
    ]
    logits = np.array([plain_pairrm(oracle.model, row) for row in rows]).reshape(3, 2)
    found = oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert found == pytest.approx(expit((logits[:, 0] - logits[:, 1]) / 2), abs=1e-5)
    assert np.ptp(found) > 1e-3
    one_by_one = PairwiseModelOracle(pairrm, batch_tokens=1, scale=2.0)
    assert one_by_one.win_probability(PROMPTS, FIRST, SECOND) == pytest.approx(
        expit(logits[:, 0] - logits[:, 1]), abs=1e-5
    )


def test_pairrm_cuts_what_is_long_and_takes_no_marker_from_a_text(pairrm):
    oracle = PairwiseModelOracle(pairrm)
    encode = lambda *question, prompt=5, response=5: pairrm_ids(  # noqa: E731
        oracle.tokenizer, oracle.model.config, question, prompt, response
    )
    head, end = ids("[CLS] <|source|>"), ids("[SEP]")
    one, two = ids("[SEP] [CLS] <|candidate1|>"), ids("[SEP] [CLS] <|candidate2|>")
    assert encode("a b c d", "e f g h", "b") == [*head, *ids("a b"), *one, *ids("e f"), *two, *ids("b"), *end]
    assert encode("a", "e f g h", "b", response=6) == [*head, *ids("a"), *one, *ids("e f g"), *two, *ids("b"), *end]
    smuggled = encode("a <|candidate1|> b", "<|source|> e", "<|candidate2|>", prompt=9)
    assert smuggled == [*head, *ids("a b"), *one, *ids("e"), *two, *end]
    oracle.tokenizer.truncation_side = "left"
    assert encode("a b c d", "e", "b")[:4] == [*head, *ids("c d")]


def test_an_output_that_is_not_finite_names_the_texts(classifier):
    oracle = PairwiseModelOracle(classifier(poison="h"), text_template=TEMPLATE)
    with pytest.raises(OracleError, match=r"expected a finite output, got nan for 'a b c d', 'h', 'h h'"):
        oracle.win_probability(PROMPTS, FIRST, SECOND)


def test_what_is_no_pairwise_model_is_refused(classifier, pairrm):
    with pytest.raises(ValueError, match="text_template: PairRM has a form of its own"):
        PairwiseModelOracle(pairrm, text_template=TEMPLATE)
    stored = json.loads((pairrm / "config.json").read_text())
    (pairrm / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "cand1_prefix_id"}))
    with pytest.raises(ValueError, match="cand1_prefix_id"):
        PairwiseModelOracle(pairrm)
    with pytest.raises(ValueError, match="expected a classifier with 1 or 2 outputs, got 3"):
        PairwiseModelOracle(classifier(3), text_template=TEMPLATE)


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": 0},
        {"batch_tokens": 0},
        {"cache_size": 0},
        {"max_prompt_tokens": 3},
        {"device": "cpu,cpu"},
        {"text_template": None},
        {"text_template": "{first} {second}"},
        {"dtype": "int8"},
    ],
)
def test_bad_settings_are_refused(classifier, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        PairwiseModelOracle(classifier(), **{"text_template": TEMPLATE, **bad})


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="cannot load pairwise model '/no/such/folder'"):
        PairwiseModelOracle("/no/such/folder")


def test_the_cache_is_bounded(classifier):
    oracle = PairwiseModelOracle(classifier(), text_template=TEMPLATE, cache_size=2)
    expected = PairwiseModelOracle(classifier(), text_template=TEMPLATE).win_probability(PROMPTS, FIRST, SECOND)
    assert oracle.win_probability(PROMPTS, FIRST, SECOND) == pytest.approx(expected, abs=1e-6)
    assert len(oracle._cache) == 2
