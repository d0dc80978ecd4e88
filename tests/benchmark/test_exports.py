"""What a run leaves for others loads in their tools: labels in `datasets` and TRL, the model in transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_duel_env import cli
from llm_duel_env.benchmark.run_config import RunConfig
from llm_duel_env.benchmark.run_folder import RunFolder
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.session import Session
from llm_duel_env.options import Export
from llm_duel_env.quiet import no_progress_bars


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run on the tiny language model, of seconds."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    told = RunConfig(
        agent="online_dpo",
        env="duel/TinyTLDR-v0",
        folder=str(folder),
        budget=12,
        batch=6,
        overrides={"policy.learning_rate": 1e-3, "policy.warmup": 0.0, "policy.temperature": 1.0},
        eval_every=1.0,
        eval_prompts=4,
    )
    run(told, say=lambda _line: None)
    return folder


def test_the_policy_is_an_ordinary_model_with_the_same_logits(played, tmp_path, capsys):
    out = tmp_path / "model"
    assert cli.carry_out(Export(played, out, "policy")) == 0
    assert str(out) in capsys.readouterr().out
    with no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        tokenizer = AutoTokenizer.from_pretrained(out)
    with Session(RunConfig.read(played), RunFolder(played)) as session:
        start = session.agent.policy.model.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        session.agent.load(RunFolder(played).saved() / "agent")
        policy = session.agent.policy.model
        observation = session.core.task.observe(np.arange(3))
    trained = policy.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in trained.items())  # it is not the supervised one
    for prompt in observation["prompt"]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert cli.carry_out(Export(played, out, "policy")) == 2  # nothing is written over
    assert "does not exist yet" in capsys.readouterr().err


def test_a_finite_task_has_no_language_model_to_export(tmp_path, capsys):
    told = {"candidates": 4, "train_prompts": 20, "heldout_prompts": 5}
    run(
        RunConfig("uniform", "duel/Synthetic-v0", str(tmp_path / "run"), budget=8, batch=8, eval_prompts=5,
                  env_kwargs={"task_kwargs": told}),
        say=lambda _line: None,
    )  # fmt: skip
    assert cli.carry_out(Export(tmp_path / "run", tmp_path / "out", "policy")) == 2
    assert "is a finite task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.carry_out(Export(tmp_path / "nowhere", tmp_path / "out", "policy")) == 2


def test_the_labels_are_a_preference_set_that_trl_trains_on_as_it_is(played, tmp_path):
    """`datasets` loads the file, and TRL's DPOTrainer takes a step on it: the loss begins at log 2, weights move."""
    datasets = pytest.importorskip("datasets", reason="THE EXTRA hub IS NOT INSTALLED: the export goes untested")
    trl = pytest.importorskip("trl", reason="THE EXTRA trl IS NOT INSTALLED: the export goes untested")
    out = tmp_path / "pairs.jsonl"
    assert cli.carry_out(Export(played, out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    with no_progress_bars():
        loaded = datasets.load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.column_names == ["prompt", "chosen", "rejected"]
        assert list(loaded) == rows
        with Session(RunConfig.read(played), RunFolder(played)) as session:
            name = session.core.task.view().model
        model = AutoModelForCausalLM.from_pretrained(name)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        settings = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=len(rows), learning_rate=1e-3,
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, args=settings, train_dataset=loaded, processing_class=AutoTokenizer.from_pretrained(name)
        )
        done = trainer.train()
    assert done.global_step == 1
    assert done.training_loss == pytest.approx(np.log(2), abs=1e-4)  # the policy is its own reference still
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
