"""Sample duels: what is written down, that it bears on nothing, and what is refused when it is read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_helpers import config, sea, silent

from llm_duel_env.agents.online_dpo import OnlineDPO
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.samples import LONGEST, Sample, cut, kept, read_samples, samples
from llm_duel_env.benchmark.session import Session
from llm_duel_env.benchmark.stored import keep, keep_samples
from llm_duel_env.types import Candidates, Duels

NAN = float("nan")


def round_of(task, responses, preference, **told):
    """The samples of one round of duels about the task's first prompts."""
    pair = Candidates(task.observe(np.arange(len(responses))), responses)
    info = {"preference": np.array(preference), "metrics/probability": np.array([0.9] * len(preference))}
    duels = Duels(pair, ~np.isnan(info["preference"]), **told)
    return duels, samples(task, duels.noted("because"), info, round=3, queries=7)


def test_a_run_keeps_a_few_duels_of_every_mark(tmp_path):
    run(sea(tmp_path / "run"), say=silent)
    found = read_samples(tmp_path / "run" / "samples.jsonl")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    marks = [line["queries"] for line in metrics if line["kind"] == "eval"][1:]  # the first is before any duel
    assert sorted({sample.queries for sample in found}) == sorted(set(marks))
    assert len(found) <= 3 * len(marks)
    by = {sample.labelled_by for sample in found}
    assert by >= {"oracle", "agent"}  # and nobody, where the budget ended or a member found both alike
    for sample in found:
        assert sample.reason
        assert 0 <= sample.belief <= 1
        assert sample.spread >= 0
        assert "candidate" in sample.first
        assert "context" in sample.prompt
        assert (sample.first_wins is None) == (sample.labelled_by == "nobody")
    asked = [sample for sample in found if sample.labelled_by == "oracle"]
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    labels = {(line["prompt_id"], line["round"]): line["label"] for line in ledger if "label" in line}
    for sample in asked:
        if not sample.same:
            assert sample.first_wins == labels[sample.prompt_id, sample.round - 1]


def test_what_was_written_after_the_last_checkpoint_is_written_again(tmp_path, monkeypatch):
    whole, broken = sea(tmp_path / "whole"), sea(tmp_path / "broken", checkpoint_every=1e-6)
    run(whole, say=silent)
    save, saved = Session.save_if_due, []

    def killed(session):
        if len(saved) > 3 and session.samples.bytes > saved[-1]:  # samples are written that no checkpoint knows
            raise KeyboardInterrupt
        save(session)
        saved.append(session.samples.bytes)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "save_if_due", killed)
        with pytest.raises(KeyboardInterrupt):
            run(broken, say=silent)
    written = (tmp_path / "broken" / "samples.jsonl").stat().st_size
    assert written > saved[-1]
    run(broken, resume=True, say=silent)
    found = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "broken")]
    assert found[0] == found[1]
    assert len(found[0]) > written


def test_notes_bear_on_nothing(tmp_path, monkeypatch):
    run(config(tmp_path / "noted"), say=silent)
    told = OnlineDPO.act
    monkeypatch.setattr(OnlineDPO, "act", lambda self, prompts: dataclasses.replace(told(self, prompts), notes=None))
    run(config(tmp_path / "plain"), say=silent)
    ledgers = [Path(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("noted", "plain")]
    assert ledgers[0] == ledgers[1]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("noted", "plain")]
    assert results[0]["curve"] == results[1]["curve"]
    plain = read_samples(tmp_path / "plain" / "samples.jsonl")
    assert {(sample.reason, sample.belief) for sample in plain} == {("", None)}


def test_neither_the_environment_nor_the_learner_sees_a_note(finite_task):
    task = finite_task()
    pair = Candidates(task.observe(np.arange(2)), np.array([[0, 1], [2, 3]]))
    noted = Duels(pair).noted("because", np.array([0.5, 0.5]))
    assert set(noted.action()) == set(Duels(pair).action())
    assert "notes" not in vars(noted.judged(np.array([1.0, 0.0])))
    with pytest.raises(ValueError, match="expected 2 of each"):
        Duels(pair).noted(["one alone"])


def test_text_is_kept_as_it_was_and_cut(text_task):
    task = text_task()
    responses = np.array([["yes", "x" * (LONGEST + 9)], ["same", "same"]], object)
    _, (long, same) = round_of(task, responses, [0.0, 0.5])
    assert long.prompt == "Was ist Größe?"
    assert long.first == "yes"
    assert long.second.endswith(f"... [{LONGEST + 9} characters]")
    assert (long.first_wins, long.oracle_probability, long.same) == (0.0, 0.9, False)
    assert same.same


def test_a_finite_task_with_texts_shows_them(finite_task, monkeypatch):
    task = finite_task()
    told = lambda ids, responses: [(f"prompt {i}", f"<b>{k}</b>") for i, k in zip(ids, responses)]  # noqa: E731
    monkeypatch.setattr(task, "texts", told, raising=False)
    _, (sample,) = round_of(task, np.array([[2, 4]]), [1.0])
    assert (sample.prompt, sample.first, sample.second) == ("prompt 0", "<b>2</b>", "<b>4</b>")


def test_one_of_each_kind_is_kept_whatever_the_outcome(finite_task):
    assert kept(np.array(["agent", "nobody", "oracle", "oracle"])) == [0, 1, 2]
    assert kept(np.array(["nobody"])) == [0]
    synthetic = np.array([NAN, 1.0, NAN], np.float32)
    _, found = round_of(finite_task(), np.array([[0, 1]] * 3), [NAN, NAN, 0.0], synthetic=synthetic)
    assert [(sample.labelled_by, sample.first_wins) for sample in found] == [
        ("nobody", None),
        ("agent", 1.0),
        ("oracle", 0.0),
    ]


def test_a_few_are_kept_with_the_results_of_the_first_seeds(tmp_path):
    lines = [json.dumps({"number": number, "text": "x" * 100}) + "\n" for number in range(30)]
    of_seed = [config(tmp_path / f"run-{seed}", seed=seed, label="sea") for seed in range(3)]
    of_others_texts = config(tmp_path / "run-pool", seed=0, label="sea-pool", env="duel/Pool-v0", env_kwargs={})
    for told in [*of_seed, of_others_texts]:
        Path(told.folder).mkdir()
        curve = {"queries": [0, 100], "offline_win_rate": [0.5, 0.9]}
        (Path(told.folder) / "result.json").write_text(json.dumps({"label": "sea", "curve": curve}))
        (Path(told.folder) / "samples.jsonl").write_text("".join(lines))
        keep([told], tmp_path / "kept")
    found = sorted((tmp_path / "kept").rglob("samples.jsonl"))
    assert [path.parent.name for path in found] == ["seed-0", "seed-1"]
    assert (tmp_path / "kept" / "sea-pool" / "seed-0" / "result.json").exists()
    numbers = [json.loads(line)["number"] for line in found[0].read_text().splitlines()]
    assert numbers == [0, 6, 12, 17, 23, 29]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(f'"{"y" * 3000}{number}"\n' for number in range(6)))
    keep_samples(long, tmp_path / "fitted.jsonl")
    assert [line[-2] for line in (tmp_path / "fitted.jsonl").read_text().splitlines()] == ["1", "3", "5"]
    keep_samples(tmp_path / "missing.jsonl", tmp_path / "nothing.jsonl")
    assert not (tmp_path / "nothing.jsonl").exists()


def test_what_is_read_is_checked(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    good = dict.fromkeys((field.name for field in dataclasses.fields(Sample)), 1) | {"labelled_by": "oracle"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good)[:30])  # a torn last line is no line
    (sample,) = read_samples(path)
    assert sample.prompt == "1"
    for broken in ({**good, "belief": "<script>"}, {"round": 1}, []):
        path.write_text(json.dumps(broken) + "\n")
        with pytest.raises(ValueError, match="expected sample duels"):
            read_samples(path)
    assert cut("abc", 2) == "ab... [3 characters]"
