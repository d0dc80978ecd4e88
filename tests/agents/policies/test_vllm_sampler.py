"""vLLM itself behind the policy: tokens, ends, log-probabilities, seeds, pushes, whole runs. `make test-vllm`."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import distributed
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config

from llm_duel_env import ranks
from llm_duel_env.agents.losses import dpo
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.language_model import LanguageModelPolicy
from llm_duel_env.agents.policies.samplers import vllm_process, vllm_sampler
from llm_duel_env.agents.policies.samplers.base import numbered
from llm_duel_env.agents.policies.scoring import log_probs
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.runner import RunInterrupted, run
from llm_duel_env.benchmark.session import Session
from llm_duel_env.tasks import make_task
from llm_duel_env.types import Preferences, rows_of

if importlib.util.find_spec("vllm") is None:
    told = "NOT TESTED: vLLM is not installed here; `make test-vllm` runs these tests in an environment that has it"
    warnings.warn(told, stacklevel=1)
    pytest.skip(told, allow_module_level=True)

_spec = importlib.util.spec_from_file_location("policy_fixtures", Path(__file__).with_name("conftest.py"))
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)

CONFIG = PolicyConfig(learning_rate=3e-3, warmup=0.0, batch=4, temperature=0.9, sampler="vllm")
IDS = np.array([3, 11, 3, 40, 8])
ENDS = {2, 5}
# Heads of 32: vLLM's attention on a CPU knows no smaller ones.
SHAPE = {**fixtures.SHAPE, "hidden_size": 128, "intermediate_size": 64, "initializer_range": 0.12}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family) -> a model with two ends of its own."""

    def make(family):
        path = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().save_pretrained(path)
        fixtures.make_tokenizer().save_pretrained(path)
        return str(path)

    return make


def make(path, config=CONFIG, seed=0, **view):
    return LanguageModelPolicy(fixtures.make_view(path, **view), config, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def llama(folder):
    """A policy whose engine several tests share; none of them trains it."""
    policy = make(folder("llama"))
    yield policy
    policy.vllm.close()


@pytest.fixture(scope="module")
def tiny():
    """TinyTLDR's policy, whose prompts are long enough to fill blocks of vLLM's cache. Trained by the tests."""
    policy = LanguageModelPolicy(make_task("tiny_tldr").view(), CONFIG, seed=0, device="cpu")
    yield policy
    policy.vllm.close()


def same(one, other):
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.responses, other.responses)


def far(policy, observation, stream, n=4, temperature=0.9):
    """Per token, the largest distance of vLLM's log-probabilities from those of transformers."""
    prompts = policy.tokens.prompts(observation["prompt"])
    sampled = policy.vllm.sample(prompts, numbered(observation["prompt_id"]), stream, n=n, temperature=temperature)
    tokens, lengths = torch.from_numpy(sampled.tokens), torch.from_numpy(sampled.lengths)
    with torch.no_grad(), policy.models.using(policy.model):
        own = log_probs(policy.model, prompts, tokens, lengths, share_prefix=False, per_token=True)
    assert sampled.log_probs.shape == sampled.tokens.shape
    return float(np.abs(own.numpy() - sampled.log_probs).max())


def train(policy, observation, number=0):
    candidates = policy.sample(observation, 2, ("round", number))
    means = candidates.tokens.sum(-1) / candidates.lengths
    labels = (means[:, 0] < means[:, 1]).astype(np.float32)
    preferences = Preferences(candidates, labels, np.ones(len(labels), bool))
    return policy.update(partial(dpo, beta=0.1), preferences, progress=0.1, key=("shuffle", number))


def test_a_round_with_more_prompt_tokens_than_one_pass_takes_gives_what_two_smaller_ones_give(folder, monkeypatch):
    monkeypatch.setattr(vllm_sampler, "BATCHED_TOKENS", 1)  # so a pass takes as many as one prompt and response can have
    monkeypatch.setattr(vllm_sampler, "SEQUENCES", 32)
    policy, observation = make(folder("llama")), fixtures.observe(np.arange(40))
    whole = policy.sample(observation, 6, ("many",))
    halves = [policy.sample(rows_of(observation, part), 6, ("many",)) for part in np.split(np.arange(40), 2)]
    policy.vllm.close()
    assert whole.responses.tolist() == [row for half in halves for row in half.responses.tolist()]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_probs_are_those_of_transformers(folder, family):
    policy = make(folder(family))
    assert far(policy, fixtures.observe(IDS), (0, "a")) < 1e-5
    train(policy, fixtures.observe(IDS))
    assert far(policy, fixtures.observe(IDS), (0, "a")) < 1e-5  # with tied and untied output layers
    policy.vllm.close()


def test_responses_end_as_the_torch_sampler_s_do(llama):
    candidates = llama.sample(fixtures.observe(np.arange(40)), 6, ("a",))
    assert candidates.shape == (40, 6)
    assert llama.vllm.engine is not None
    last = np.take_along_axis(candidates.tokens, candidates.lengths[..., None] - 1, axis=2)[..., 0]
    ended = np.isin(last, list(ENDS))
    assert set(last[ended]) == ENDS  # both ends occur, and stay
    assert (candidates.lengths[~ended] == 10).all()  # and what has none was cut at the limit
    assert (~ended).any()
    for tokens, length in zip(candidates.tokens.reshape(240, -1), candidates.lengths.flat):
        assert not set(tokens[: length - 1]) & ENDS
        assert not tokens[length:].any()
    texts = llama.tokens.decode(candidates.tokens, candidates.lengths)
    assert np.array_equal(texts, candidates.responses)


def test_greedy_responses_are_those_of_the_torch_sampler(llama):
    plain = make(llama.task.model, replace(CONFIG, sampler="torch"))
    observation = fixtures.observe(np.arange(30))
    mine, theirs = llama.greedy(observation), plain.greedy(observation)
    assert same(mine, theirs)
    assert len(set(mine.lengths.flat)) > 1


def test_draws_follow_seed_key_and_prompt_only(llama):
    observation = fixtures.observe(IDS)
    whole = llama.sample(observation, 4, ("a", 1))
    assert same(whole, llama.sample(observation, 4, ("a", 1)))
    part = llama.sample(fixtures.observe(IDS[3:]), 4, ("a", 1))
    assert np.array_equal(part.tokens, whole.tokens[3:, :, : part.tokens.shape[2]])
    assert not same(whole, llama.sample(observation, 4, ("a", 2)))
    assert not np.array_equal(whole.tokens[0], whole.tokens[2])  # the same prompt, visited twice in one batch
    llama.vllm.close()
    assert same(whole, llama.sample(observation, 4, ("a", 1)))  # by another engine


def test_the_distribution_is_the_torch_sampler_s(llama):
    plain = make(llama.task.model, replace(CONFIG, sampler="torch"))
    n, rows = 250, 16
    observation = {"prompt_id": np.arange(rows), "prompt": ("w1 w2 w3 w4",) * rows}
    ids = torch.tensor([llama.tokens.prompts(["w1 w2 w3 w4"])[0]])
    with torch.no_grad():
        exact = torch.softmax(llama.model(ids).logits[0, -1].double() / 0.9, -1).numpy()
    common = exact * n * rows >= 5  # too rare ones are counted together
    expected = np.append(exact[common], exact[~common].sum()) * n * rows
    for policy in (llama, plain):
        first = policy.sample(observation, n, ("many",)).tokens[:, :, 0].ravel()
        counts = np.bincount(first, minlength=len(exact))
        assert chisquare(np.append(counts[common], counts[~common].sum()), expected).pvalue > 0.01
        # Independent of one another: the next response to a prompt agrees as often as chance has it.
        agree = (first.reshape(rows, n)[:, 1:] == first.reshape(rows, n)[:, :-1]).mean()
        assert abs(agree - (exact**2).sum()) < 4 * np.sqrt((exact**2).sum() / (n * rows))


def test_reference_and_mixture_are_drawn_by_torch(llama):
    plain = make(llama.task.model, replace(CONFIG, sampler="torch"))
    observation = fixtures.observe(IDS)
    pushes = llama.vllm.pushes
    for how in ({"reference": True}, {"mixture": 0.5}):
        assert same(llama.sample(observation, 3, ("a",), **how), plain.sample(observation, 3, ("a",), **how))
    assert llama.vllm.pushes == pushes


def test_every_update_reaches_the_engine_before_the_next_draw(tiny):
    observation = tiny.task.observe(np.arange(8))
    assert min(len(ids) for ids in tiny.tokens.prompts(observation["prompt"])) > vllm_sampler.CPU_BLOCK
    assert far(tiny, observation, (0, "a")) < 1e-5
    before = tiny.sample(observation, 4, ("a",))
    start = tiny.log_prob(before)
    pushes = tiny.vllm.pushes
    for number in range(2):
        train(tiny, observation, number)
        # The same prompts again: what the old weights left in the prefix cache would be seen here.
        assert far(tiny, observation, (0, "a")) < 1e-5
        assert tiny.vllm.pushes == pushes + 1 + number
    assert (tiny.log_prob(before) - start).abs().max() > 0.05
    assert not same(before, tiny.sample(observation, 4, ("a",)))
    assert tiny.vllm.pushes == pushes + 2  # and none where nothing changed


def test_reset_and_load_reach_the_engine(tiny, tmp_path):
    observation = tiny.task.observe(np.arange(8))
    train(tiny, observation)
    tiny.save(tmp_path)
    trained = tiny.sample(observation, 4, ("a",))
    tiny.reset()
    assert far(tiny, observation, (0, "a")) < 1e-5
    assert not same(trained, tiny.sample(observation, 4, ("a",)))
    tiny.load(tmp_path)
    assert same(trained, tiny.sample(observation, 4, ("a",)))


ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
BESIDE = {
    "lora": LORA,
    "zero2": {"learner": "deepspeed"},
    "zero3": {"learner": "deepspeed", "deepspeed_config": ZERO3},
    "zero3 and lora": {"learner": "deepspeed", "deepspeed_config": ZERO3, **LORA},
}


@pytest.mark.timeout(1200)  # the first time DeepSpeed builds its communication operation
@pytest.mark.parametrize("name", BESIDE)
def test_beside_deepspeed_and_adapters(name, tmp_path):
    settings = dict(BESIDE[name])
    for package, wanted in (("deepspeed", "learner" in settings), ("peft", "lora_rank" in settings)):
        if wanted:
            pytest.importorskip(package)
    if "deepspeed_config" in settings:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(settings["deepspeed_config"]))
        settings["deepspeed_config"] = str(path)
    policy = LanguageModelPolicy(make_task("tiny_tldr").view(), replace(CONFIG, **settings), seed=0, device="cpu")
    observation = policy.task.observe(np.arange(8))
    before = policy.sample(observation, 4, ("a",))
    start = policy.log_prob(before)
    for number in range(3):  # adding base and adapter up rounds otherwise than running both
        assert far(policy, observation, (0, "a")) < 1e-4
        train(policy, observation, number)
    assert policy.vllm.pushes == 3
    assert (policy.log_prob(before) - start).abs().max() > 0.05
    policy.vllm.close()
    train(policy, observation, 3)  # whose process group is still there; by another engine
    assert far(policy, observation, (0, "a")) < 1e-4
    policy.vllm.close()


def test_a_process_group_that_was_there_survives_the_engine(folder):
    ranks.join("cpu")
    group = distributed.group.WORLD
    policy = make(folder("llama"))
    policy.sample(fixtures.observe(IDS), 2, ("a",))
    policy.vllm.close()
    assert distributed.group.WORLD is group
    distributed.all_reduce(torch.ones(1))


def test_an_engine_samples_on_when_another_one_is_closed(folder):
    one, other = make(folder("llama")), make(folder("qwen3"))
    observation = fixtures.observe(IDS)
    for policy in (one, other):
        policy.sample(observation, 2, ("a",))
    one.vllm.close()
    train(other, observation)
    assert far(other, observation, (0, "a")) < 1e-5
    other.vllm.close()


def test_a_missing_model_is_named_with_the_versions(folder):
    policy = make(folder("llama"))
    policy.vllm.model = "/no/such/folder"
    with pytest.raises(RuntimeError, match=r"vllm.* 0\..*torch.*cannot load '/no/such/folder'(.|\n)*sampler=torch"):
        policy.sample(fixtures.observe(IDS), 2, ("a",))


def test_online_dpo_goes_on_from_a_checkpoint_as_if_never_stopped(tiny_game, tmp_path):
    settings = {"policy.sampler": "vllm"}
    log = tiny_game.check_resume("online_dpo", tmp_path, rounds=(2, 2), **settings)
    assert len(log) == 4


def test_engines_are_gone_with_their_policies(folder):
    gc.collect()
    before = vllm_process._open_engines
    policy = make(folder("llama"))
    policy.sample(fixtures.observe(IDS), 2, ("a",))
    assert vllm_process._open_engines == before + 1
    del policy
    gc.collect()
    assert vllm_process._open_engines == before


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def test_a_run_stopped_and_resumed_is_the_uninterrupted_one_of_another_process(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [
        sys.executable, "-m", "llm_duel_env.cli", "run", "--agent", "online_dpo", "--env", "duel/TinyTLDR-v0",
        "--budget", "16", "--batch", "8", "--eval-every", "0.5", "--eval-prompts", "8", "--folder", str(whole),
        "--set", "policy.sampler=vllm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    config = replace(RunConfig.read(whole), folder=str(broken))
    assert config.overrides["policy.sampler"] == "vllm"
    monkeypatch.setattr("llm_duel_env.benchmark.session.Session.evaluate_if_due", stopping())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(RunInterrupted, match="stopped after"):
        run(config, say=str)
    result = run(config, resume=True, say=str)
    torch.set_num_threads(threads)
    assert result["queries"] == 16
    assert metrics_of(whole) == metrics_of(broken)
    assert (whole / "ledger.jsonl").read_bytes() == (broken / "ledger.jsonl").read_bytes()


def stopping():
    """`Session.evaluate_if_due` that asks the run to stop, as Ctrl-C does, after the first round."""
    real, rounds = Session.evaluate_if_due, []

    def evaluate_if_due(self):
        real(self)
        rounds.append(1)
        if len(rounds) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    return evaluate_if_due
