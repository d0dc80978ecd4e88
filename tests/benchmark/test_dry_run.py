"""Runs as files, and what a dry run says of them: examples/runs, and the estimates against what torch holds."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_duel_env import cli
from llm_duel_env.agents.policies import lora, memory, memory_parts, traced
from llm_duel_env.agents.policies.base import PolicyConfig
from llm_duel_env.agents.policies.learners.torch_learner import TorchLearner
from llm_duel_env.agents.policies.samplers import torch_sampler
from llm_duel_env.agents.policies.scoring import log_probs
from llm_duel_env.benchmark import dry_run as module
from llm_duel_env.benchmark import run_command, run_file, shapes
from llm_duel_env.benchmark.runner import command_line
from llm_duel_env.benchmark.stand_ins import StandIn, stand_ins
from llm_duel_env.options import Run
from llm_duel_env.oracles.judge import JudgeOracle

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples/runs").glob("*.yaml"))
SHORT = ("task_kwargs.max_new_tokens=16", "task_kwargs.max_prompt_tokens=48")
RANKS = {"tldr_1b_8gpu": 8, "tldr_7b_2nodes": 16}
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50, "max_position_embeddings": 128,
}  # fmt: skip


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def small_config():
    return LlamaConfig(**{name: value for name, value in SHAPE.items() if name != "model_type"})


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(small_config()).eval()


def work(**changes):
    told = {
        "ranks": 1, "prompts": 6, "evaluated": 2, "candidates": 3, "ranked": 2, "prompt_tokens": 20, "new_tokens": 8,
        "policy": small_config(), "bf16": False,
    }  # fmt: skip
    return memory_parts.Work(**{**told, **changes})


def part(parts, begins):
    found = [one for one in parts if one.name.startswith(begins)]
    assert len(found) == 1, [one.name for one in parts]
    return found[0]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fresh(*words, config=None):
    return run_command.fresh(Run(config=config, set=(words,) if words else ()))


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # a recipe names the DeepSpeed files from there


# Files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_dry_run(path, at_root, capsys):
    if "lora" in path.stem:
        pytest.importorskip("peft")
    told = Run(config=path, dry_run=True, ranks=RANKS.get(path.stem, 1), env_set=(SHORT,))
    assert cli.carry_out(told) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(module.VERDICT)
    assert "prompts up to 48 and responses up to 16 tokens" in printed
    assert "activations" in printed
    assert "warning" not in printed
    config = fresh(config=path)
    assert config.agent == "sea"
    assert not Path(config.folder).exists()


@pytest.mark.slow
def test_a_recipe_is_small_enough_for_its_gpu_at_its_full_lengths(at_root):
    for path in FILES:
        if "lora" in path.stem:
            continue  # needs peft; the same code
        config, file = fresh(config=path), run_file.read(path)
        counts = module.Counts(kind="text", candidates=20)
        counts.view = type(
            "View", (), {"name": "text", "encoder": None, "max_prompt_tokens": 512, "max_new_tokens": 53}
        )
        parts = module._parts(config, counts, RANKS.get(path.stem, 1), file.shapes, file.gpu_memory)
        for name in ("begin", "sample", "score", "label", "learn"):
            assert 0 < sum(getattr(one, name) for one in parts) < file.gpu_memory * module.GIB


def test_a_file_says_the_run_and_options_override_it(tmp_path):
    text = """
agent: online_dpo
env: duel/Synthetic-v0
env_kwargs: {flip_rate: 0.1, task_kwargs: {candidates: 6, train_prompts: 40}}
overrides: {policy: {learning_rate: 2.0e-3, batch: 16}, beta: 0.3}
seed: 4
budget: 300
recipe: false
"""
    path = write(tmp_path, text)
    config = fresh(config=path)
    assert config.overrides == {"policy.learning_rate": 2e-3, "policy.batch": 16, "beta": 0.3}
    assert (config.seed, config.budget, config.batch) == (4, 300, 32)
    assert config.folder == "runs/Synthetic-v0/online_dpo/seed-4"
    told = Run(
        config=path, seed=5, batch=8, set=(("policy.batch=4",),), env_set=(("task_kwargs.candidates=9",),),
        folder=tmp_path / "run",
    )  # fmt: skip
    config = run_command.fresh(told)
    assert config.overrides == {"policy.learning_rate": 2e-3, "policy.batch": 4, "beta": 0.3}
    assert config.env_kwargs == {"flip_rate": 0.1, "task_kwargs": {"candidates": 9, "train_prompts": 40}}
    assert (config.seed, config.budget, config.batch, config.folder) == (5, 300, 8, str(tmp_path / "run"))


def test_the_recorded_command_says_what_the_file_said(tmp_path):
    import tyro

    text = "agent: sea\nenv: duel/Synthetic-v0\nbatch: 8\noverrides: {policy: {batch: 16}, opponent: ee}\n"
    config = fresh(config=write(tmp_path, text))  # with the task's recipe
    words = shlex.split(command_line(config, resume=False))[2:]
    assert "--config" not in words
    assert run_command.fresh(tyro.cli(Run, args=words)) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("agnet: sea", "no setting of a run is called 'agnet'. Did you mean 'agent'"),
        ("agent: [sea]", "agent: expected the name of an agent, got ['sea']"),
        ("agent: sea\nbudget: many", "budget: expected a whole number, got 'many'"),
        ("agent: sea\nseed: true", "seed: expected a whole number, got True"),
        ("agent: sea\neval_every: 2e-2", "eval_every: expected a number, got '2e-2'"),
        ("agent: sea\noverrides: [a]", "overrides: expected settings by name, got ['a']"),
        ("agent: sea\noverrides: {policy: {batch: 1}, policy.batch: 2}", "policy.batch is given twice: 1 and 2"),
        ("overrides: {beta: 1}", "overrides: expected an agent beside them"),
        ("agent: sea\nenv: duel/Text-v0\noverrides: {betta: 1}", "SEAConfig has no field 'betta'"),
        ("agent: see\noverrides: {beta: 1}", "no agent is called 'see'. Did you mean 'sea'"),
        ("agent: sea", "expected --agent and --env"),
        ("- agent", "expected settings by name, got ['agent']"),
        ("agent: {", "expected YAML"),
        ("agent: sea\ngpu_memory: 0", "gpu_memory: expected GiB of each GPU, a positive number, got 0"),
        ("agent: sea\nshapes: {a: 3}", "shapes: a: expected the fields of its configuration by name, got 3"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, capsys, text, told):
    assert cli.carry_out(Run(config=write(tmp_path, text))) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert cli.carry_out(Run(config=tmp_path / "no.yaml")) == 2
    assert "expected a YAML file" in capsys.readouterr().err


def test_what_cannot_be_dry_run_is_refused(tmp_path, capsys, monkeypatch):
    assert cli.carry_out(Run(resume=tmp_path, dry_run=True)) == 2
    assert "expected a run that is not begun" in capsys.readouterr().err
    assert cli.carry_out(Run(resume=tmp_path, config=tmp_path / "run.yaml")) == 2
    assert "leave --config out" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.carry_out(Run(agent="uniform", env="duel/Synthetic-v0", dry_run=True)) == 2
    assert "say how many with --ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({}, "or say its fields in the --config file: shapes: {owner/none"),
        ({"model_type": "llama"}, "got no hidden_size"),
        ({**SHAPE, "model_type": "lama"}, "a model_type that transformers knows, got 'lama'"),
        ({**SHAPE, "heads": 3}, "expected fields of LlamaConfig, got heads"),
        ({**SHAPE, "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_shape_that_is_wrong_or_missing_is_refused(told, wrong, monkeypatch):
    def nowhere(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(shapes.AutoConfig, "from_pretrained", nowhere)
    with pytest.raises(ValueError, match=wrong):
        shapes.config_of("owner/none", {"owner/none": told} if told else {})


# Stand-ins


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "qwen3", "gemma2", "mistral"])
def test_a_tiny_model_has_its_family_and_reads_its_words(family, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    told = {**SHAPE, "model_type": family}
    if family == "gpt_neox":
        del told["num_key_value_heads"]
    folder = shapes.write_tiny(shapes.config_of("a/b", {"a/b": told}), tmp_path)
    config, words = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.model_type, config.max_position_embeddings) == (family, 128)
    assert len(words("ab cd zz qx", add_special_tokens=False)["input_ids"]) == 5  # the first has no blank before it
    assert len(words) == config.vocab_size


TEXT = {"model": "a/b", "oracle": "reward_model:a/b", "max_prompt_tokens": 24, "max_new_tokens": 6}


@pytest.mark.parametrize("preset", ["tldr", "ultrafeedback", "hh_rlhf", "shp2", None])
@pytest.mark.parametrize("agent", ["online_dpo"])
def test_every_preset_has_its_rows(preset, agent, tmp_path):
    kwargs = {**TEXT, **({"preset": preset} if preset else {"prompts": "a/c", "prompt_column": "question"})}
    config = fresh_text(agent, kwargs, tmp_path / "real")
    small, _ = stand_ins(config, {"a/b": SHAPE}, tmp_path)
    task = small.env_kwargs["task"]
    assert (task.train_prompts, task.heldout_prompts) == (10, 2)
    assert task.reference(np.array([0])) is not None
    assert len(task.observe(np.array([0]))["prompt"][0].split()) >= 24


def fresh_text(agent, task_kwargs, folder, **overrides):
    from llm_duel_env.benchmark.run_config import RunConfig

    return RunConfig(agent, "duel/Text-v0", str(folder), env_kwargs={"task_kwargs": task_kwargs}, overrides=overrides)


def test_an_oracle_that_costs_something_is_not_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(JudgeOracle, "__init__", lambda *_args, **_kwargs: pytest.fail("the judge was made"))
    config = fresh_text("online_dpo", {**TEXT, "oracle": "judge:gpt", "preset": "tldr"}, tmp_path / "real")
    small, notes = stand_ins(config, {"a/b": SHAPE}, tmp_path)
    assert isinstance(small.env_kwargs["task"].oracle, StandIn)
    assert any("judge:gpt" in note for note in notes)


def test_wrong_settings_of_task_and_oracle_are_refused(tmp_path):
    for changes, told in (
        ({"oracle": None}, "task_kwargs: expected oracle"),
        ({"orakel": 1}, "got orakel"),
        ({"oracle_kwargs": {"batch": 3}}, "batch"),
        ({"preset": "tl"}, "preset: expected one of"),
        ({"prompts": "no/such/file.jsonl"}, "no such file"),
        ({"oracle": "judge:gpt", "oracle_kwargs": {"modell": 1}}, "modell"),
    ):
        config = fresh_text("online_dpo", {**TEXT, "preset": "tldr", **changes}, tmp_path / "real")
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            stand_ins(config, {"a/b": SHAPE}, tmp_path)


def test_a_malformed_file_of_the_users_is_told_of(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "label": "b"}\n{"question": "a"}\n')
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr", "prompts": str(path)}, tmp_path / "real")
    with pytest.raises(ValueError, match="row 2"):
        stand_ins(config, {"a/b": SHAPE}, tmp_path)


# The dry run itself


def run_dry(config, ranks=1, **kwargs):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    total = module.dry_run(config, ranks, {"a/b": SHAPE}, console=console, **kwargs)
    return total, console.export_text()


def test_a_finite_task_is_dry_run_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = Run(agent="sea", env="duel/Synthetic-v0", dry_run=True, budget=700, env_set=(("task_kwargs.candidates=8",),))
    assert cli.carry_out(told) == 0
    printed = capsys.readouterr().out
    assert "700" in printed
    assert printed.rstrip().endswith(module.VERDICT)
    assert not list(tmp_path.iterdir())


def test_the_deepspeed_file_is_checked_without_deepspeed(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    settings = {"policy.learner": "deepspeed", "policy.deepspeed_config": str(path)}
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr"}, tmp_path / "real", **settings)
    if module.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed says so itself")
    with pytest.raises(ValueError, match="train_batch_size: expected 128"):
        run_dry(config, 4)


def test_the_work_of_a_run_is_told(tmp_path):
    settings = {"candidates": 4, "oracle_share": 0.5, "burn_in": 0.1, "policy.batch": 16, "policy.passes": 2}
    config = fresh_text("sea", {**TEXT, "preset": "tldr"}, tmp_path / "real", **settings)
    _, told = run_dry(config)
    found = [line.split("│")[1:3] for line in told.splitlines() if line.count("│") == 3]
    rows = {name.strip(): value.strip() for name, value in found}
    # 100 queries of 1,000 before half of the labels are synthetic; 32 prompts a round.
    assert rows["rounds"] == "~60 of 32 prompts"
    assert rows["gradient steps"] == "~240"  # two batches, two passes
    assert rows["responses drawn of the policy"] == "~7,680 (4 a prompt)"
    assert rows["tokens of all those"] == "at most ~46,080"
    assert rows["evaluations"].startswith("51 of 512 prompts")


def test_an_agent_that_learns_late_is_played_until_it_does(tmp_path):
    config = fresh_text("selm", {**TEXT, "preset": "tldr"}, tmp_path / "real")
    _, told = run_dry(config)
    assert "3 rounds of 8 prompts" in told
    assert "no gradient step" not in told


def test_a_run_that_does_not_load_what_it_saved_is_found(tmp_path, monkeypatch):
    from llm_duel_env.agents.policies.models import Models

    monkeypatch.setattr(Models, "load", lambda *_args, **_kwargs: None)
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr"}, tmp_path / "real")
    with pytest.raises(RuntimeError, match="answers differently"):
        run_dry(config)


def test_too_small_a_gpu_is_warned_of(tmp_path):
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr"}, tmp_path / "real")
    total, told = run_dry(config, gpu_memory=0.5)
    assert "it may not fit" in told
    assert max(total.values()) > 0.5


def test_settings_that_contradict_one_another_break_it(tmp_path):
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr", "max_new_tokens": 120}, tmp_path / "real")
    with pytest.raises(ValueError, match="expected at most 128 tokens"):
        run_dry(config)


def test_a_run_that_is_there_already_is_refused(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("")
    config = fresh_text("online_dpo", {**TEXT, "preset": "tldr"}, tmp_path)
    with pytest.raises(ValueError, match="holds a ledger"):
        run_dry(config)


# The estimates against what torch holds


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2"])
def test_weights_are_counted_as_they_are(family):
    told = {**SHAPE, "model_type": family, "tie_word_embeddings": family == "gemma2"}
    if family == "gpt_neox":
        del told["num_key_value_heads"]
    config = shapes.config_of("a/b", {"a/b": told})
    real = AutoModelForCausalLM.from_config(config)
    counted = memory_parts.Weights.of(traced.on_meta(config), False)
    assert counted.total == counted.trained == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_and_moments_are_what_the_torch_learner_holds(rank):
    if rank:
        pytest.importorskip("peft")
    config, model = PolicyConfig(lora_rank=rank), small_model()
    if rank:
        lora.add_adapter(model, config, 0)
    learner = TorchLearner(model, config)
    learner.begin(1e-3)
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = size(p.grad for p in trained)
    learner.step()
    moments = size(state[name] for state in learner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    parts = memory.estimate(config, work())
    assert part(parts, "policy, ").learn == size(model.parameters())
    assert part(parts, "gradients").learn == gradients
    assert part(parts, "AdamW").learn == moments
    reference = part(parts, "reference")
    assert reference.learn == (0 if rank else size(model.parameters()))


def test_the_samplers_cache_is_as_large_as_estimated(monkeypatch):
    seen = {}
    prefill, cache = torch_sampler.prefill, torch_sampler.ResponseCache

    def spied_prefill(*args):
        prefix = seen["prefix"] = prefill(*args)
        return prefix

    def spied_cache(*args):
        seen["cache"] = cache(*args)
        return seen["cache"]

    monkeypatch.setattr(torch_sampler, "prefill", spied_prefill)
    monkeypatch.setattr(torch_sampler, "ResponseCache", spied_cache)
    model, prompts = small_model(), [[k % 40 for k in range(20)]] * 6
    torch_sampler.sample_tokens(model, prompts, torch.rand(6, 3, 8), n=3, max_new_tokens=8, eos=[999])
    held = size(seen["prefix"].keys + seen["prefix"].values)
    held += size(tensor for layer in seen["cache"].layers for tensor in (layer.keys, layer.values))
    assert part(memory.estimate(PolicyConfig(), work()), "keys and values, ").sample == held


WAYS = {
    "packed": (2, {"packed": True, "linear_head": True, "one_call": True}),
    "shared": (40, {"packed": True, "linear_head": True}),
    "copied": (40, {"one_call": True}),
}


@pytest.mark.parametrize("layout", list(WAYS))
def test_activations_are_what_a_forward_pass_keeps(layout):
    n, ways = WAYS[layout]
    model, config = small_model(), small_config()
    prompts, tokens = [[k % 40 for k in range(20)]] * 6, torch.ones(6, n, 8, dtype=torch.int64)
    with traced.Alive(model) as alive:
        value = log_probs(model, prompts, tokens, torch.full((6, n), 8), **ways)
    assert value.requires_grad
    sizes = {"rows": 6, "responses": n, "prompt_tokens": 20, "new_tokens": 8, "one_call": layout != "shared"}
    assert traced.layout_of(config, n, 20, 8, sizes["one_call"]) == layout
    estimated = traced.learning(config, PolicyConfig(), **sizes, bf16=False)
    assert estimated == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("responses", [2, 40])
def test_checkpointing_and_bfloat16_need_less(responses):
    sizes = {"rows": 6, "responses": responses, "prompt_tokens": 20, "new_tokens": 8, "one_call": True}
    config = small_config()
    config.num_hidden_layers = 12
    whole = traced.learning(config, PolicyConfig(), **sizes, bf16=False)
    assert traced.learning(config, PolicyConfig(), **sizes, bf16=True) < 0.9 * whole
    assert traced.learning(config, PolicyConfig(gradient_checkpointing=True), **sizes, bf16=False) < 0.4 * whole


@pytest.mark.parametrize(("layout", "responses"), [("packed", 2), ("shared", 40)])
def test_layers_that_are_left_out_are_counted(layout, responses):
    config = small_config()
    config.num_hidden_layers = 7
    sizes = {"rows": 4, "responses": responses, "prompt_tokens": 20, "new_tokens": 8, "one_call": False, "bf16": False}
    whole = traced._forward(config, PolicyConfig(), 7, (4, responses, 20, 8), layout, False)
    assert traced.learning(config, PolicyConfig(), **sizes) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_cuts_the_optimizers_state_into_shares(stage, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(f'{{"bf16": {{"enabled": true}}, "zero_optimization": {{"stage": {stage}}}}}')
    config = PolicyConfig(learner="deepspeed", deepspeed_config=str(path))
    total = memory_parts.Weights.of(small_model(), False).total
    for ranks in (1, 4):
        parts = memory.estimate(config, work(ranks=ranks, bf16=True))
        assert part(parts, "weights and AdamW").learn == 12 * total / ranks
        held = part(parts, "policy, 2 bytes").learn
        assert held == (2 * total / ranks if stage == 3 else 2 * total)
    away = f'{{"zero_optimization": {{"stage": {stage}, "offload_optimizer": {{"device": "cpu"}}}}}}'
    path.write_text(away)
    offloaded = part(memory.estimate(config, work(ranks=4)), "weights and AdamW")
    assert (offloaded.learn, offloaded.cpu) == (0, 12 * total / 4)


def test_an_offloaded_reference_is_on_the_gpu_while_it_scores():
    found = part(memory.estimate(PolicyConfig(offload_reference=True), work()), "reference")
    whole = size(small_model().parameters())
    assert (found.sample, found.score, found.learn, found.cpu) == (0, whole, 0, whole)


def test_one_round_off_is_for_one_rank():
    with pytest.raises(ValueError, match="expected one rank"):
        memory.estimate(PolicyConfig(asynchronous=True), work(ranks=2))


def test_every_rank_has_an_engine_of_vllm_on_its_gpu():
    for ranks in (1, 2):
        parts = memory.estimate(PolicyConfig(sampler="vllm"), work(ranks=ranks, gpu_bytes=1000))
        assert part(parts, "vLLM").sample == 300
