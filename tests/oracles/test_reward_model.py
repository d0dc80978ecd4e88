import threading

import numpy as np
import pytest
import torch
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.remote import RemoteOracle
from llm_duel_env.oracles.reward_model import RewardModelOracle

WORDS = [
    "<unk>",
    "<pad>",
    "<eos>",
    "<bos>",
    "user",
    "assistant",
    ":",
    "|",
    "grüße",
    "猫",
    "🙂",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
]
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} | {% endfor %}"
RESPONSES = np.array(["a", "b c d e f g h", "猫 grüße", "a b", "h h h h", "🙂"], object)
PROMPTS = {"prompt": ("a b c", "d", "猫", "e f", "a b c", "d"), "prompt_id": np.arange(6)}


@pytest.fixture
def build(tmp_path):
    def make(
        chat=None, pad="<pad>", config_pad=1, bos=False, labels=1, cls=LlamaForSequenceClassification, poison=None
    ):
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos:
            tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
        special = {"pad_token": pad, "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=24, **special)
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_labels=labels, pad_token_id=config_pad, eos_token_id=2, bos_token_id=3, initializer_range=0.5,
        )  # fmt: skip
        model = cls(config)
        if poison is not None:
            with torch.no_grad():
                model.model.embed_tokens.weight[WORDS.index(poison)] = float("nan")
        model.save_pretrained(folder)
        return folder

    return make


def alone(folder, ids):
    """The score that the model itself gives to one row, with no padding and none of the oracle's code."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("case", [{}, {"chat": CHAT}, {"bos": True}])
@pytest.mark.parametrize("padding", [("<pad>", 1), ("<eos>", 2), (None, None), ("<pad>", None)])
def test_a_batch_scores_as_one_at_a_time(build, case, padding):
    folder = build(pad=padding[0], config_pad=padding[1], **case)
    oracle = RewardModelOracle(folder)
    scores = oracle.utility(PROMPTS, RESPONSES)
    rows = [oracle.encode(p, r) for p, r in zip(PROMPTS["prompt"], RESPONSES)]
    assert len(set(map(len, rows))) > 3
    assert scores == pytest.approx([alone(folder, row) for row in rows], abs=1e-5)
    assert len(set(scores.round(4))) == 6
    assert oracle.model.config.pad_token_id == padding[1]


def test_order_batch_size_and_padding_side_do_not_matter(build):
    folder = build()
    expected = RewardModelOracle(folder).utility(PROMPTS, RESPONSES)
    order = np.array([3, 1, 5, 0, 4, 2])
    shuffled = {"prompt": tuple(PROMPTS["prompt"][i] for i in order)}
    for tokens in (1, 24, 10_000):
        oracle = RewardModelOracle(folder, batch_tokens=tokens)
        oracle.tokenizer.padding_side = "left"
        assert oracle.utility(shuffled, RESPONSES[order]) == pytest.approx(expected[order], abs=1e-5)


def test_batches_stay_within_the_tokens_allowed(build, monkeypatch):
    oracle = RewardModelOracle(build(), batch_tokens=20)
    oracle.packs = False  # test_packed_scores.py has the other way
    shapes = []
    real = oracle._call
    monkeypatch.setattr(
        oracle, "_call", lambda m, ids, mask, p: (shapes.append(tuple(ids.shape)), real(m, ids, mask, p))[1]
    )
    oracle.utility(PROMPTS, RESPONSES)
    assert all(rows * width <= 20 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == 6
    assert len(shapes) < 6


def test_win_probability_is_the_sigmoid_of_the_scaled_gap(build):
    folder = build()
    first, second = RESPONSES, RESPONSES[::-1]
    plain, scaled = RewardModelOracle(folder), RewardModelOracle(folder, scale=0.25)
    gap = plain.utility(PROMPTS, first) - plain.utility(PROMPTS, second)
    assert plain.win_probability(PROMPTS, first, second) == pytest.approx(expit(gap), abs=1e-6)
    assert scaled.win_probability(PROMPTS, first, second) == pytest.approx(expit(gap / 4), abs=1e-6)
    assert scaled.utility(PROMPTS, first) == pytest.approx(plain.utility(PROMPTS, first) / 4, abs=1e-6)
    assert plain.win_probability(PROMPTS, first, first).tolist() == [0.5] * 6
    assert plain.has_utility


def test_each_distinct_text_is_scored_once(build):
    oracle = RewardModelOracle(build())
    prompts = {"prompt": ("a", "a", "b", "a"), "prompt_id": np.arange(4)}
    scores = oracle.utility(prompts, np.array(["c", "c", "c", "d"], object))
    assert oracle.rows_scored == 3
    assert scores[0] == scores[1] != scores[2]
    oracle.win_probability(prompts, np.array(["c", "d", "c", "e"], object), np.array(["d", "c", "c", "d"], object))
    assert oracle.rows_scored == 4


def test_the_cache_is_bounded_and_forgets_the_oldest(build):
    oracle = RewardModelOracle(build(), cache_size=2)
    ask = lambda *texts: oracle.utility({"prompt": ("a",) * len(texts)}, np.array(texts, object))  # noqa: E731
    assert len(set(ask("a", "b", "c").round(4))) == 3  # more than it remembers, at once
    assert oracle.rows_scored == 3
    ask("b")  # remembered, and now younger than c
    ask("d")  # c is forgotten
    assert oracle.rows_scored == 4
    ask("b")
    assert oracle.rows_scored == 4
    ask("c")
    assert oracle.rows_scored == 5


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def test_what_the_model_reads(build):
    plain = RewardModelOracle(build())
    assert plain.encode("a b", "猫") == ids("a b 猫 <eos>")
    assert plain.encode("a b", "猫 <eos>") == ids("a b 猫 <eos>")
    assert RewardModelOracle(build(bos=True)).encode("a", "b") == ids("<bos> a b <eos>")
    chat = build(chat=CHAT)
    assert RewardModelOracle(chat).encode("a", "🙂") == ids("<bos> user : a | assistant : 🙂 |")
    template = RewardModelOracle(chat, text_template="user : {prompt} | {response}")
    assert template.encode("a", "b") == ids("user : a | b <eos>")
    assert template.encode("a {response}", "b {prompt}") == ids("user : a <unk> | b <unk> <eos>")
    assert RewardModelOracle(chat, max_length=3).encode("a b c", "d") == ids(": d |")
    assert len(plain.encode("a " * 30, "b")) == 24  # the tokenizer's own limit


@pytest.mark.parametrize("bos", [False, True])
def test_what_another_server_reads_is_the_same_where_the_template_ends_the_text(build, bos):
    """vLLM and text-embeddings-inference give the model what the tokenizer makes of the text that they are sent."""
    oracle = RewardModelOracle(build(bos=bos))
    read = []
    for template in (None, "{prompt} {response}<eos>"):
        remote = RemoteOracle("http://127.0.0.1:1", protocol="tei", text_template=template)
        (text,) = remote._body([("a b", "猫")])["inputs"][0]
        read.append(oracle.tokenizer(text)["input_ids"])
    assert read == [oracle.encode("a b", "猫")[:-1], oracle.encode("a b", "猫")]


def test_what_vllm_reads_by_a_chat_template_is_the_same(build):
    oracle = RewardModelOracle(folder := build(chat=CHAT, bos=True))
    remote = RemoteOracle("http://127.0.0.1:1", protocol="vllm-classify", model="m", tokenizer=str(folder))
    body = remote._body([("a b", "猫")])
    read = oracle.tokenizer(body["input"][0], add_special_tokens=body["add_special_tokens"])["input_ids"]
    assert read == oracle.encode("a b", "猫")


@pytest.mark.parametrize("template", ["{prompt}", "{response}", ""])
def test_a_template_holds_prompt_and_response(build, template):
    with pytest.raises(ValueError, match="text_template"):
        RewardModelOracle(build(), text_template=template)


def test_a_nan_score_names_the_text(build):
    oracle = RewardModelOracle(build(poison="猫"), batch_tokens=1)
    with pytest.raises(OracleError, match="prompt 'd', response '猫 a'"):
        oracle.utility({"prompt": ("a", "d")}, np.array(["b", "猫 a"], object))
    assert np.isfinite(oracle.utility({"prompt": ("a",)}, np.array(["b"], object))).all()


def test_what_is_no_reward_model_is_refused(build):
    with pytest.raises(ValueError, match="expected a classifier with 1 output, got 3"):
        RewardModelOracle(build(labels=3))
    with pytest.raises(ValueError, match=r"not a trained reward model.*score.weight"):
        RewardModelOracle(build(cls=LlamaForCausalLM))


@pytest.mark.parametrize(
    "bad", [{"scale": 0}, {"batch_tokens": 0}, {"max_length": 0}, {"dtype": "int8"}, {"cache_size": 0}]
)
def test_bad_settings_are_refused(build, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        RewardModelOracle(build(), **bad)


def test_the_global_generator_is_left_alone(build):
    folder = build()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    RewardModelOracle(folder).utility(PROMPTS, RESPONSES)
    assert torch.rand(1) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_bfloat16_and_close(build):
    folder = build()
    oracle = RewardModelOracle(folder)
    assert oracle.model.dtype == torch.bfloat16
    cpu = RewardModelOracle(folder, device="cpu").utility(PROMPTS, RESPONSES)
    assert oracle.utility(PROMPTS, RESPONSES) == pytest.approx(cpu, abs=0.1)


@pytest.mark.parametrize("name", ["/no/such/folder", "no such/hub//name"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"cannot load reward model '{name}': expected a folder"):
        RewardModelOracle(name)


def test_copies_share_the_work_and_score_alike(build, monkeypatch):
    folder = build()
    one, two = RewardModelOracle(folder, device="cpu"), RewardModelOracle(folder, device="cpu,cpu")
    assert len(two.models) == 2
    used, both, real = [], threading.Barrier(2, timeout=30), two._score

    def score(model, pieces):
        if not used:
            both.wait()  # passes only where both copies are at work at once
        used.append(two.models.index(model))
        return real(model, pieces)

    monkeypatch.setattr(two, "_score", score)
    assert two.utility(PROMPTS, RESPONSES) == pytest.approx(one.utility(PROMPTS, RESPONSES), abs=1e-5)
    assert set(used) == {0, 1}
    assert two.rows_scored == 6


def test_an_error_of_one_copy_is_raised(build):
    oracle = RewardModelOracle(build(poison="猫"), device="cpu,cpu", batch_tokens=6)
    with pytest.raises(OracleError, match="finite score"):
        oracle.utility(PROMPTS, RESPONSES)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "cpu,", ""])
def test_devices_that_are_not_there(build, device):
    with pytest.raises(ValueError, match="device: expected"):
        RewardModelOracle(build(), device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_gpu_scores_alike(build):
    folder = build()
    gpus = RewardModelOracle(folder, device="all", dtype="float32")
    assert len(gpus.models) == torch.cuda.device_count()
    twice = RewardModelOracle(folder, device="cuda:0,cuda:0", dtype="float32")
    cpu = RewardModelOracle(folder, device="cpu").utility(PROMPTS, RESPONSES)
    assert gpus.utility(PROMPTS, RESPONSES) == pytest.approx(cpu, abs=1e-3)
    assert twice.utility(PROMPTS, RESPONSES) == pytest.approx(cpu, abs=1e-3)
