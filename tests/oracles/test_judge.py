"""The judge against an endpoint on loopback that replies as a chat model does, or as it should not."""

import json
import re

import numpy as np
import pytest

from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.judge import JudgeOracle, verdict

QUICK = {"backoff": 0.01, "read_timeout": 0.5, "connect_timeout": 0.5, "deadline": 5.0, "attempts": 2, "in_flight": 2}
TEMPLATE = "{prompt}|{first}|{second}"
PROMPTS = {"prompt": ("p", "q", "r"), "prompt_id": np.arange(3)}
FIRST = np.array(["long one", "b {second}", "same"], object)
SECOND = np.array(["short", "b {second} and more", "size"], object)


def reply(text, prompt_tokens=10, completion_tokens=3, finish="stop"):
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def longest(path, body):
    """Prefers the longer response."""
    assert path == "/v1/chat/completions"
    _, first, second = body["messages"][-1]["content"].split("|")
    name = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "C"
    return reply(f"Let me see.\n[[{name}]]")


def judge(server, **more):
    return JudgeOracle("m", url=server.url + "/v1", template=TEMPLATE, **{**QUICK, **more})


def test_both_orders_are_asked_and_averaged(serve):
    server = serve(longest)
    oracle = judge(server)
    assert oracle.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    asked = [body["messages"][0]["content"] for body in server.seen]
    assert sorted(asked) == sorted(
        "|".join(question) for p, a, b in zip(PROMPTS["prompt"], FIRST, SECOND) for question in ((p, a, b), (p, b, a))
    )
    assert oracle.win_probability(PROMPTS, SECOND, FIRST).tolist() == [0.0, 1.0, 0.5]
    assert len(server.seen) == 6  # the other way round is known
    oracle.close()


def test_a_judge_that_likes_what_comes_first_decides_nothing(serve):
    oracle = judge(serve(lambda path, body: reply("[[A]]")))
    assert oracle.win_probability(PROMPTS, FIRST, SECOND).tolist() == [0.5] * 3
    half = judge(serve(lambda path, body: reply("[[C]]" if "|short|" in body["messages"][0]["content"] else "[[A]]")))
    assert half.win_probability(PROMPTS, FIRST, SECOND).tolist() == [0.75, 0.5, 0.5]
    oracle.close()
    half.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "[[A]] because",
        "[[A]]\n[[B]]",
        "[[D]]",
        "[[ A ]]",
        "[[a]]",
        "**[[A]]**",
        "verdict: [[A]]",
        "[[A]] or [[B]]",
    ],
)
def test_verdicts_are_strict(text):
    assert verdict(text) is None


@pytest.mark.parametrize(("text", "said"), [("[[A]]", 1.0), ("so\n\n [[B]] \n", 0.0), ("I say [[C]], so\n[[C]]", 0.5)])
def test_verdicts(text, said):
    assert verdict(text) == said


def test_an_unparsable_reply_is_asked_again_otherwise_and_paid(serve):
    server = serve(longest)
    server.faults = [lambda _: reply("well..."), lambda _: reply("[[A]]", finish="length")]
    oracle = judge(server, input_price=1_000_000, output_price=2_000_000)
    assert oracle.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    assert [(body["seed"], body["temperature"]) for body in server.seen].count((1, 0.7)) == 2
    spent = oracle.usage()
    assert (spent["replies"], spent["unparsable"]) == (8, 2)
    assert (spent["prompt_tokens"], spent["completion_tokens"], spent["cost"]) == (80, 24, 128.0)
    oracle.close()


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "[[A]]"}], "missing"])
def test_a_reply_without_text_is_paid_for_and_asked_again_otherwise(serve, tmp_path, content):
    def without_text(answer):
        message = {"refusal": "I must not."} | ({} if content == "missing" else {"content": content})
        return answer | {"choices": [{"message": message, "finish_reason": "stop"}]}

    server = serve(longest)
    server.faults = [without_text]
    oracle = judge(server, input_price=100_000, max_cost=8.0)  # 1 a reply
    oracle.open(tmp_path)
    assert oracle.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    assert [(body["seed"], body["temperature"]) for body in server.seen] == [(0, 0.0)] * 6 + [(1, 0.7)]
    spent = oracle.usage()
    assert (spent["replies"], spent["unparsable"], spent["prompt_tokens"], spent["cost"]) == (7, 1, 70, 7.0)
    server.faults = [without_text] * 9
    with pytest.raises(OracleError, match=r"has cost 9\.0000, and max_cost is 8"):
        oracle.win_probability({"prompt": ("new",)}, FIRST[:1], SECOND[:1])
    oracle.close()
    again = judge(server)
    again.open(tmp_path)
    assert again.usage()["replies"] == 9
    with pytest.raises(OracleError, match=r"2 questions were put 1 times without one, e.g. '\(no text\)'"):
        judge(server, cache=tmp_path / "judge.jsonl", verdict_attempts=1).win_probability(
            {"prompt": ("new",)}, FIRST[:1], SECOND[:1]
        )
    again.close()


def test_a_judge_without_verdict_is_refused(serve):
    server = serve(lambda path, body: reply("I cannot say."))
    oracle = judge(server, verdict_attempts=2)
    with pytest.raises(OracleError, match=r"6 questions were put 2 times without one, e.g. 'I cannot say.'"):
        oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert len(server.seen) == 12
    oracle.close()


FAULTS = {
    "slow": ("slow", "no answer within"),
    "500": (500, "status 500"),
    "429": (429, "status 429"),
    "half": ("half", "the connection broke"),
    "garbage": ("garbage", "no JSON"),
    "deep": ("deep", "no JSON"),
    "no choices": (lambda _: {"choices": []}, "at least one"),
    "no message": (lambda _: {"choices": [{"message": None}]}, "message: expected an object"),
    "an error": (lambda _: {"error": "overloaded"}, "expected an object with 'choices'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_survived_or_said_and_never_become_a_label(serve, tmp_path, fault):
    server = serve(longest)
    server.faults = [FAULTS[fault][0]]
    oracle = judge(server)
    oracle.open(tmp_path)
    assert oracle.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    assert oracle.usage()["replies"] == 6
    server.faults = [FAULTS[fault][0]] * 4
    with pytest.raises(OracleError, match=FAULTS[fault][1]):
        oracle.win_probability({"prompt": ("new",)}, FIRST[:1], SECOND[:1])
    assert oracle.usage()["replies"] == 6
    oracle.close()


def test_what_was_paid_is_kept_over_a_failure_and_a_restart(serve, tmp_path):
    server = serve(longest)
    server.faults = [None, None, None, 400]
    first = judge(server, in_flight=1)
    first.open(tmp_path)
    with pytest.raises(OracleError, match="status 400"):
        first.win_probability(PROMPTS, FIRST, SECOND)
    with open(tmp_path / "judge.jsonl", "ab") as file:
        file.write(b'{"key": "to')  # killed while writing
    second = judge(server)
    second.open(tmp_path)
    assert second.usage()["replies"] == 3
    assert second.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    answered = server.seen[:3] + server.seen[4:]
    assert len({json.dumps(body) for body in answered}) == len(answered) == 6
    lines = (tmp_path / "judge.jsonl").read_text().split("\n")[:-1]
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 6
    first.close()
    second.close()


def test_a_given_cache_serves_any_run_of_the_same_content_and_no_other(serve, tmp_path):
    server = serve(longest)
    judge(server, cache=tmp_path / "c.jsonl").win_probability(PROMPTS, FIRST, SECOND)
    again = judge(server, cache=tmp_path / "c.jsonl")
    again.open(tmp_path / "another run")
    again.win_probability(PROMPTS, FIRST, SECOND)
    assert len(server.seen) == 6
    for other in ({"system": "Be strict."}, {"max_tokens": 7}, {"options": {"top_p": 0.5}}):
        before = len(server.seen)
        judge(server, cache=tmp_path / "c.jsonl", **other).win_probability(PROMPTS, FIRST, SECOND)
        assert len(server.seen) == before + 6


def test_a_damaged_cache_is_refused(serve, tmp_path):
    (tmp_path / "judge.jsonl").write_text('{"key": "a", "verdict": "A"}\n')
    with pytest.raises(OracleError, match="expected replies of a judge"):
        judge(serve(longest)).open(tmp_path)
    (tmp_path / "judge.jsonl").write_text("nonsense\n")
    with pytest.raises(OracleError, match="line 1: expected a JSON object"):
        judge(serve(longest)).open(tmp_path)


def test_the_cost_is_bounded(serve):
    server = serve(longest)
    oracle = judge(server, input_price=100_000, max_cost=2.0)  # 1 a reply
    with pytest.raises(OracleError, match=r"has cost 2\.0000, and max_cost is 2"):
        oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert len(server.seen) == 2
    oracle.close()


def test_a_limit_of_cost_that_cannot_be_held_ends_the_asking(serve, tmp_path):
    def silent(path, body):
        return {"choices": longest(path, body)["choices"], "usage": {"completion_tokens": 3}}

    server = serve(silent)
    oracle = judge(server, input_price=1.0, max_cost=100.0)
    oracle.open(tmp_path)
    with pytest.raises(OracleError, match=r"reported no tokens for 2 of 2 replies, and max_cost is 100"):
        oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert len(server.seen) == 2  # what was under way; both are kept
    free = judge(server)
    free.open(tmp_path)
    assert free.win_probability(PROMPTS, FIRST, SECOND).tolist() == [1.0, 0.0, 0.5]
    assert len(server.seen) == 6
    oracle.close()
    free.close()


def test_options_win_and_none_takes_away(serve):
    server = serve(longest)
    oracle = judge(server, system="S", options={"max_tokens": None, "max_completion_tokens": 9, "temperature": 1.0})
    oracle.win_probability(PROMPTS, FIRST, SECOND)
    body = server.seen[0]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["temperature"], body["model"]) == (9, 1.0, "m")
    assert body["messages"][0] == {"role": "system", "content": "S"}
    oracle.close()


def test_the_key_is_sent_and_written_nowhere(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    server = serve(longest)
    oracle = judge(server, token_env="JUDGE_KEY")
    oracle.open(tmp_path)
    oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert set(server.tokens) == {"Bearer sk-very-secret"}
    server.faults = [401]
    with pytest.raises(OracleError) as error:
        oracle.win_probability({"prompt": ("new",)}, FIRST[:1], SECOND[:1])
    assert "secret" not in str(error.value)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    oracle.close()


@pytest.mark.parametrize("usage", [{}, {"usage": {"prompt_tokens": 10**400, "completion_tokens": -1}}])
def test_a_server_that_reports_no_tokens_is_told_of(serve, usage):
    answer = {"choices": reply("[[C]]")["choices"], **usage}
    oracle = judge(serve(lambda path, body: answer), input_price=1.0)
    oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert oracle.usage()["unreported"] == 6
    assert oracle.usage()["prompt_tokens"] == 0
    oracle.close()


def test_win_rates_are_not_asked_of_a_judge_unless_told_to(serve, text_task):
    from llm_duel_env.envs.core import DuelCore

    server = serve(lambda path, body: reply("[[C]]"))
    for evaluate, requests in ((False, 2), (True, 6)):
        server.seen.clear()
        core = DuelCore(text_task(oracle=judge(server, evaluate=evaluate)))
        core.reset(0)
        ids = core.prompt_ids(1)
        outcome = core.duel(ids, np.array(["a"], object), np.array(["b"], object), np.ones(1, bool))
        assert np.isnan(outcome.metrics["online_win_rate"]).all() == (not evaluate)
        assert len(server.seen) == requests  # of both responses against the reference, and the label
        core.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"template": "{prompt} {first}"}, "{second}"),
        ({"max_tokens": 0}, "max_tokens: expected"),
        ({"input_price": -1}, "input_price: expected"),
        ({"max_cost": 5.0}, "max_cost: expected input_price or output_price with it"),
        ({"url": "nowhere"}, "address like http"),
        ({"model": ""}, "name of a model"),
        ({"token": "sk-1"}, "token: no such setting"),
    ],
)
def test_wrong_settings_are_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        JudgeOracle(**{"model": "m", "url": "http://127.0.0.1:1/v1", **arguments})
