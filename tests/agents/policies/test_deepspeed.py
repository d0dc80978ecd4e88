"""The DeepSpeed learner on two gloo ranks: equal to the torch learner in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("deepspeed_worker", HERE / "deepspeed_worker.py")
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
fixtures = worker.fixtures

if importlib.util.find_spec("deepspeed") is None:
    not_tested = "NOT TESTED: deepspeed is not installed here; `make test-deepspeed` runs these tests where it is"
    warnings.warn(not_tested, stacklevel=1)
    pytest.skip(not_tested, allow_module_level=True)

pytestmark = pytest.mark.timeout(1500)  # the first run builds DeepSpeed's communication op
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
# Tiny models fall below DeepSpeed's threshold and would never be scattered.
STAGE3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
CPU = {"device": "cpu"}
CASES = {
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}, "differ": True},
    "zero2": {
        "deepspeed": {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "torch_adam": True}},
        },
        "resume": True, "reset": True,
    },
    "zero3": {"deepspeed": {"zero_optimization": STAGE3}, "resume": True, "reset": True},
    "offload": {"deepspeed": {"zero_optimization": {**STAGE3, "offload_optimizer": CPU, "offload_param": CPU}}},
    "checkpointed": {"deepspeed": {"zero_optimization": STAGE3}, "policy": {"gradient_checkpointing": True}},
    "bf16": {"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "resume": True},
}  # fmt: skip
WITH_PEFT = {
    "lora2": {"deepspeed": {"zero_optimization": {"stage": 2}}, "policy": LORA},
    "lora3": {"deepspeed": {"zero_optimization": STAGE3}, "policy": LORA, "resume": True, "reset": True},
}
if importlib.util.find_spec("peft") is not None:
    CASES |= WITH_PEFT
# What goes on elsewhere, on three ranks: whose checkpoint (a case's, or the torch learner's), and under what.
ELSEWHERE = {
    "stage3": ("zero2", {"zero_optimization": {"stage": 3}}),  # all of a tiny model stays whole on each rank
    "offload3": ("zero3", CASES["offload"]["deepspeed"]),
    "torch1": ("torch", {"zero_optimization": {"stage": 1}}),
    "bf16": ("bf16", {"bf16": {"enabled": True}, "zero_optimization": STAGE3}),
}
if importlib.util.find_spec("peft") is not None:
    ELSEWHERE |= {"lora2": ("lora3", {"zero_optimization": {"stage": 2}})}
EXACT = [name for name in CASES if name != "bf16"]
RESUMED = [name for name in EXACT if "resume" in CASES[name]]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def launch(command: list[str], folder: Path, timeout: float) -> None:
    """Runs the worker under a launcher; a hang ends as a failure."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DEEPSPEED_TIMEOUT": "5"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[2]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE / "deepspeed_worker.py"), str(folder)],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def played(tmp_path_factory, model_folder):
    """What two ranks under torchrun left of all cases."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "job.json").write_text(json.dumps({"model": model_folder(), "cases": CASES}))
    launch(torchrun(2), folder, 1400)
    return folder


@pytest.fixture(scope="module")
def gone_on(played, tmp_path_factory, model_folder):
    """What three ranks left of the runs that go on elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    policy = worker.make(model_folder(), worker.CONFIG)
    worker.play(policy, range(worker.CUT))
    policy.save(folder / "torch" / "checkpoint")
    cases = {}
    for name, (source, document) in ELSEWHERE.items():
        home = folder if source == "torch" else played
        cases[name] = {"deepspeed": document, "policy": CASES.get(source, {}).get("policy", {})}
        cases[name]["from"] = str(home / source / "checkpoint")
    (folder / "job.json").write_text(json.dumps({"model": model_folder(), "cases": cases}))
    launch(torchrun(3), folder, 600)
    return folder, {name: Path(case["from"]) for name, case in cases.items()}


@pytest.fixture(scope="module")
def alone(model_folder):
    """alone(name) -> the torch learner's policy and metrics of a case, in this process."""
    made = {}

    def play(name: str):
        settings = tuple(sorted(CASES[name].get("policy", {}).items()))
        if settings not in made:
            policy = worker.make(model_folder(), replace(worker.CONFIG, **dict(settings)))
            made[settings] = policy, worker.play(policy, range(worker.ROUNDS))
        return made[settings]

    return play


def results(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def assert_weights(found: dict, policy, model: str, tolerance: float = 1e-4) -> None:
    """Each tensor is where the policy's is, compared with how far it has come. Not number by number: Adam makes a step
    of full length of a gradient that is nothing but rounding."""
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    expected = dict(policy.model.named_parameters())
    assert set(found) >= set(expected)
    trained = [name for name, p in expected.items() if p.requires_grad]
    assert trained
    for name, parameter in expected.items():
        value = parameter.detach()
        if name not in trained:
            assert torch.equal(found[name], value), name
            continue
        way = float((value - (policy.models._first or start)[name]).detach().norm())
        assert way > 1e-2, name
        assert float((found[name] - value).norm()) <= tolerance * way, name


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_end_where_one_process_does(played, alone, model_folder, name):
    policy, metrics = alone(name)
    assert_weights(load_file(played / f"{name}.safetensors"), policy, model_folder())
    for result in results(played, name):
        assert result["world"] == 2
        for got, expected in zip(result["metrics"], metrics, strict=True):
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                assert got[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", EXACT)
def test_ranks_score_and_sample_the_same(played, alone, name):
    policy, _ = alone(name)
    one, other = results(played, name)
    assert one["rank"] == 0
    assert other["rank"] == 1
    assert one["sampled"] == other["sampled"]
    pairs = worker.ranked(policy, 9)
    for result in (one, other):
        np.testing.assert_allclose(result["log_prob"], policy.log_prob(pairs), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(result["reference"], policy.reference_log_prob(pairs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*RESUMED, "bf16"])
def test_a_checkpoint_goes_on_exactly(played, name):
    assert results(played, name)[0]["own form"] is True
    assert results(played, name)[0]["resumed"] is True


@pytest.mark.parametrize("name", RESUMED)
def test_reset_begins_anew(played, alone, model_folder, name):
    policy, _ = alone(name)
    assert_weights(load_file(played / f"{name}.anew.safetensors"), policy, model_folder())


@pytest.mark.parametrize("name", RESUMED)
def test_a_gradient_that_is_not_finite_takes_no_step(played, name):
    for result in results(played, name):
        assert "training diverged" in result["diverged"]
        assert result["kept"]


def test_ranks_whose_weights_differ_are_found_out(played):
    for result in results(played, "zero1"):
        assert "the policy's weights: expected the same on all ranks, got others" in result["differ"]


@pytest.mark.parametrize("name", RESUMED)
def test_the_export_is_an_ordinary_model(played, alone, name):
    policy, _ = alone(name)
    model = AutoModelForCausalLM.from_pretrained(played / name / "export").eval()
    assert AutoTokenizer.from_pretrained(played / name / "export").get_vocab() == policy.tokenizer.get_vocab()
    assert not (played / name / "export" / "adapter_config.json").exists()
    ids = torch.tensor([[1, 7, 9, 20, 31]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, rtol=1e-3, atol=1e-3)


def test_bf16_rounds_the_weights_and_still_learns(played, alone):
    policy, metrics = alone("zero2")
    found = load_file(played / "bf16.safetensors")
    gaps = {name: float((found[name] - value).abs().max()) for name, value in policy.model.named_parameters()}
    assert 1e-6 < max(gaps.values()) < 0.05
    assert any((value != value.bfloat16().float()).any() for value in found.values())  # the float32 ones
    assert results(played, "bf16")[0]["metrics"][-1]["loss"] == pytest.approx(metrics[-1]["loss"], abs=0.1)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_checkpoint_goes_on_on_other_ranks_and_under_another_stage(played, gone_on, alone, model_folder, name):
    (folder, sources), (source, _) = gone_on, ELSEWHERE[name]
    # Saved again at once it is what it was.
    kept, again = (load_file(p / "optimizer.safetensors") for p in (sources[name], folder / name / "checkpoint"))
    assert kept.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in kept.items())
    found, result = load_file(folder / f"{name}.safetensors"), results(folder, name)[0]
    assert result["world"] == 3
    if source == "bf16":  # rounding in another order
        whole = load_file(played / "bf16.safetensors")
        assert max(float((found[key] - value).abs().max()) for key, value in whole.items()) < 0.02
        return
    policy, metrics = alone(source if source in CASES else "zero2")
    assert_weights(found, policy, model_folder())
    assert result["metrics"][-1]["loss"] == pytest.approx(metrics[-1]["loss"], rel=1e-3)


def resumed(model: str, checkpoint: Path, rounds=range(worker.CUT, worker.ROUNDS), **settings):
    policy = worker.make(model, replace(worker.CONFIG, **settings))
    policy.load(checkpoint)
    worker.play(policy, rounds)
    return policy


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("learner", ["deepspeed", "torch"])
def test_a_checkpoint_goes_on_on_one_rank_with_either_learner(played, alone, model_folder, name, learner):
    settings = CASES[name].get("policy", {})
    policy = resumed(model_folder(), played / name / "checkpoint", learner=learner, **settings)
    assert_weights(policy.learner.weights(), alone(name)[0], model_folder())
    assert policy.gradient_steps == alone(name)[0].gradient_steps


def test_state_that_does_not_fit_is_refused(played, model_folder, tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(played / "zero2" / "checkpoint", source)
    tensors = load_file(source / "optimizer.safetensors")
    moment = next(name for name in tensors if name.endswith("/exp_avg"))
    step = moment.replace("exp_avg", "step")
    policy = worker.make(model_folder(), replace(worker.CONFIG, learner="deepspeed"))
    before = policy.learner.weights()
    for change, told in (
        ({moment: tensors[moment][:1].clone()}, "does not fit this model"),
        ({"nobody/exp_avg": tensors[moment].clone()}, "'nobody' does not fit this model"),
        ({step: tensors[step] + 1}, "one step for all parameters"),
    ):
        save_file(tensors | change, source / "optimizer.safetensors")
        with pytest.raises(ValueError, match=told):
            policy.learner.load(source)
    assert all(torch.equal(value, before[name]) for name, value in policy.learner.weights().items())


def test_a_changed_file_is_not_opened(played, model_folder, tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(played / "zero2" / "checkpoint", source)
    policy = worker.make(model_folder(), replace(worker.CONFIG, learner="deepspeed"))  # alone, a group of one
    assert policy.learner.world == 1
    record = json.loads((source / "deepspeed.json").read_text()) | policy.learner.form
    (source / "deepspeed.json").write_text(json.dumps(record))
    (source / "deepspeed" / "learner" / sorted(record["files"])[0]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="not those that were saved"):
        policy.load(source)


def test_alone_it_equals_the_torch_learner(alone, model_folder):
    policy = worker.make(model_folder(), replace(worker.CONFIG, learner="deepspeed"))
    worker.play(policy, range(worker.ROUNDS))
    assert_weights(policy.learner.weights(), alone("zero2")[0], model_folder())
    with pytest.raises(ValueError, match="deepspeed trains the policy alone"):
        policy.learner.add("head", torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_the_deepspeed_launcher_with_a_hostfile(tmp_path, alone, model_folder):
    case = {"zero2": {"deepspeed": CASES["zero2"]["deepspeed"]}}
    (tmp_path / "job.json").write_text(json.dumps({"model": model_folder(), "cases": case}))
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [launcher, "--hostfile", str(tmp_path / "hostfile"), "--no_local_rank", "--master_port", port]
    command += ["--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    launch(command, tmp_path, 600)
    assert_weights(load_file(tmp_path / "zero2.safetensors"), alone("zero2")[0], model_folder())
