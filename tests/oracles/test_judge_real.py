"""The judge against a real OpenAI-compatible server, transformers' own, on loopback."""

import os
import socket
import subprocess
import sys
import time

import httpx2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.judge import JudgeOracle
from llm_duel_env.tasks.tiny_tldr import ASSETS

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("accelerate")  # with which the server loads its model
WORDS = ["<unk>", "<eos>", "good", "bad", "p", "[[A]]", "[[B]]"]
SERVE = """
import sys
from transformers.cli.serve import Serve  # what `transformers serve` calls, without what its other commands need
Serve(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]), device="cpu")
"""
LAST_MESSAGE = "{{ messages[-1]['content'] }}"


def make_judge_model(folder):
    """A language model that knows which word follows which, and nothing else: after "bad" comes [[A]], after "good"
    [[B]], and then the end. Asked "{first} {second}", it prefers the first where the second ends in "bad"."""
    width = 8
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    follows = {"good": "[[B]]", "bad": "[[A]]", "[[A]]": "<eos>", "[[B]]": "<eos>"}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()  # no attention, no MLP: a state is its token's embedding
        model.model.embed_tokens.weight[: len(WORDS)] = torch.eye(len(WORDS), width)
        for word, after in follows.items():
            model.lm_head.weight[WORDS.index(after), WORDS.index(word)] = 20.0
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = LAST_MESSAGE
    tokenizer.save_pretrained(folder)
    return folder


def copy_with_chat_template(folder):
    """The embedded policy, which has no chat template, with a plain one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "policy")
    tokenizer.chat_template = LAST_MESSAGE
    LlamaForCausalLM.from_pretrained(ASSETS / "policy").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def serving():
    """Serves a model's folder with `transformers serve`; gives the address."""
    started = []

    def start(folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", SERVE, str(folder), str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    return f"http://127.0.0.1:{port}/v1"
            except httpx2.HTTPError:
                time.sleep(0.2)
        process.kill()
        raise AssertionError(f"the server did not start: {process.stdout.read().decode()}")

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
def test_a_real_server_judges(serving, tmp_path):
    folder = make_judge_model(tmp_path / "judge")
    oracle = JudgeOracle(str(folder), url=serving(folder), template="{prompt} {first} {second}", max_tokens=4)
    oracle.open(tmp_path)
    prompts = {"prompt": ("p", "p", "p"), "prompt_id": np.arange(3)}
    first, second = np.array(["good", "bad", "good good"], object), np.array(["bad", "good", "good"], object)
    assert oracle.win_probability(prompts, first, second).tolist() == [1.0, 0.0, 0.5]
    spent = oracle.usage()
    # Six questions, of which three are word for word another one: those are asked once.
    assert (spent["replies"], spent["unparsable"], spent["unreported"]) == (3, 0, 0)
    assert spent["prompt_tokens"] == 3 + 3 + 4
    assert spent["completion_tokens"] >= 3
    oracle.close()


@pytest.mark.slow
def test_the_embedded_policy_is_no_judge_and_is_refused(serving, tmp_path):
    folder = copy_with_chat_template(tmp_path / "policy")
    oracle = JudgeOracle(str(folder), url=serving(folder), max_tokens=8, verdict_attempts=2)
    oracle.open(tmp_path)
    prompts = {"prompt": ("the cat sat",), "prompt_id": np.arange(1)}
    with pytest.raises(OracleError, match="2 questions were put 2 times without one"):
        oracle.win_probability(prompts, np.array(["a cat"], object), np.array(["the dog"], object))
    spent = oracle.usage()
    assert (spent["replies"], spent["unparsable"]) == (4, 4)
    assert 0 < spent["completion_tokens"] <= 32
    oracle.close()
