"""Oracles by name, and runs from the command line that use them."""

import io
import json
import sys

import numpy as np
import pytest

from llm_duel_env import cli
from llm_duel_env.oracles import catalogue
from llm_duel_env.oracles.base import Oracle
from llm_duel_env.oracles.catalogue import make_oracle
from llm_duel_env.oracles.human import HumanOracle
from llm_duel_env.oracles.judge import JudgeOracle
from llm_duel_env.oracles.remote import RemoteOracle
from llm_duel_env.tasks.text import Text
from llm_duel_env.tasks.tiny_tldr import ASSETS


class Mine(Oracle):
    """An oracle of another package."""

    def __init__(self, name="", strength=1.0):
        self.name, self.strength = name, strength

    def win_probability(self, prompts, first, second):
        return np.ones(len(first))


def test_specs_make_oracles():
    assert isinstance(make_oracle("remote:http://127.0.0.1:1", {"protocol": "tei", "attempts": 2}), RemoteOracle)
    assert isinstance(make_oracle("judge:org/model:free", {"url": "http://127.0.0.1:1/v1"}), JudgeOracle)
    assert make_oracle("judge:org/model:free", {"url": "http://127.0.0.1:1/v1"}).model == "org/model:free"
    assert isinstance(make_oracle("human"), HumanOracle)


def test_another_packages_oracle_is_found_by_its_entry_point(monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return Mine

    monkeypatch.setattr(catalogue, "entry_points", lambda group: [Point()])
    made = make_oracle("mine:x", {"strength": 2.0})
    assert (made.name, made.strength) == ("x", 2.0)
    assert make_oracle("mine").name == ""


@pytest.mark.parametrize(
    ("spec", "kwargs", "said"),
    [
        ("nobody", None, "'remote:URL', .*'human' or an Oracle, got 'nobody'"),
        ("remote", None, "expected 'remote:URL'"),
        ("human:me", None, "expected 'human'"),
        ("judge:m", None, "url"),
        ("human", {"loud": True}, "loud"),
        (Mine(), {"a": 1}, "oracle_kwargs"),
    ],
)
def test_wrong_specs_are_refused(spec, kwargs, said):
    with pytest.raises(ValueError, match=said):
        make_oracle(spec, kwargs)


def prompts(tmp_path, count=20):
    rows = [{"prompt": f"post : number {n} .", "reference": f"number {n} ."} for n in range(count)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("spec", ["human", "judge:gpt-x", "remote:http://127.0.0.1:1"])
def test_a_fingerprint_asks_no_hub_about_what_is_no_model(tmp_path, monkeypatch, spec):
    monkeypatch.setattr("llm_duel_env.tasks.text.hub_commit", lambda name: pytest.fail(f"asked for {name}"))
    source = prompts(tmp_path)
    kwargs = {"url": "http://127.0.0.1:1/v1"} if spec.startswith("judge") else None
    task = Text(str(ASSETS / "policy"), spec, kwargs, prompts=source, heldout=4)
    other = Text(str(ASSETS / "policy"), Mine(), prompts=source, heldout=4)
    assert task.fingerprint() != other.fingerprint()


def command(tmp_path, *oracle):
    return [
        *("run", "--agent", "online_dpo", "--env", "duel/Text-v0", "--budget", "8", "--batch", "4"),
        *("--eval-prompts", "4", "--eval-every", "1", "--folder", str(tmp_path / "run"), "--env-set"),
        *(f"task_kwargs.model={ASSETS / 'policy'}", f"task_kwargs.prompts={prompts(tmp_path)}"),
        *("task_kwargs.heldout=4", "task_kwargs.max_prompt_tokens=96", "task_kwargs.max_new_tokens=8", *oracle),
        *("--set", "policy.learning_rate=1e-4"),
    ]


def run(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def records(tmp_path):
    text = (tmp_path / "run" / "ledger.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[1:-1]]


def test_a_run_with_a_judge_and_a_server_that_breaks(tmp_path, serve, capsys, monkeypatch):
    def longest(_path, body):
        first, second = body["messages"][0]["content"].split("<response A>")[1].split("<response B>")
        name = "A" if len(first.split("</")[0]) > len(second.split("</")[0]) else "B"
        usage = {"prompt_tokens": 100, "completion_tokens": 5}
        return {"choices": [{"message": {"content": f"[[{name}]]"}}], "usage": usage}

    server = serve(longest)
    monkeypatch.setenv("JUDGE_URL", f"{server.url}/v1")
    monkeypatch.setenv("JUDGE_KEY", "sk-never-written")
    told = [
        *("task_kwargs.oracle=judge:m", "task_kwargs.oracle_kwargs.url=$JUDGE_URL"),
        *("task_kwargs.oracle_kwargs.token_env=JUDGE_KEY", "task_kwargs.oracle_kwargs.input_price=3"),
        *("task_kwargs.oracle_kwargs.attempts=2", "task_kwargs.oracle_kwargs.backoff=0.01"),
    ]
    server.faults = [None] * 8 + [404] * 8  # the second round finds nobody
    assert run(command(tmp_path, *told)) == 1
    said = capsys.readouterr()
    assert "404" in said.err
    first = records(tmp_path)
    assert 0 < len(first) < 8
    paid = len(server.seen)
    monkeypatch.setenv("JUDGE_URL", f"{serve(longest).url}/v1")  # it has moved
    assert run(["run", "--resume", str(tmp_path / "run")]) == 0
    assert records(tmp_path)[: len(first)] == first
    assert len(records(tmp_path)) == 8
    assert paid >= 8
    replies = (tmp_path / "run" / "judge.jsonl").read_text().split("\n")[:-1]
    assert len({json.loads(reply)["key"] for reply in replies}) == len(replies)  # none was paid twice
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["oracle"]["replies"] == len(replies)
    assert result["oracle"]["prompt_tokens"] == 100 * len(replies)
    assert result["oracle"]["cost"] == pytest.approx(100 * len(replies) * 3e-6, abs=1e-5)
    assert any("oracle/cost" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"sk-never-written" in path.read_bytes() for path in files)


def test_a_run_with_a_person_who_leaves_and_comes_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\ns\nt\nq\n"))
    assert run(command(tmp_path, "task_kwargs.oracle=human")) == 130
    said = capsys.readouterr().out
    assert f"resume with: llm-duel run --resume {tmp_path / 'run'}" in said
    assert len(answers(tmp_path)) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n" * 40))
    assert run(["run", "--resume", str(tmp_path / "run")]) == 0
    assert len(records(tmp_path)) == 8
    assert [answer["answer"] for answer in answers(tmp_path)][:3] == ["left", "skip", "tie"]
    assert len({answer["key"] for answer in answers(tmp_path)}) == len(answers(tmp_path))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["oracle"]["skipped"] == 1


def answers(tmp_path):
    text = (tmp_path / "run" / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]
