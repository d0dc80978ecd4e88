"""The remote oracle against servers that misbehave: no label lost, none invented, and never a hang."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from scipy.special import expit

from llm_duel_env.envs.core import DuelCore
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.http_client import shown
from llm_duel_env.oracles.remote import RemoteOracle

PROMPTS = {"prompt": ("p", "q", "p", "r"), "prompt_id": np.arange(4)}
FIRST = np.array(["a", "bb {response}", "ccc", "猫猫猫猫"], object)
SECOND = np.array(["aaaaa", "b", "a", "dd"], object)
QUICK = {"backoff": 0.01, "read_timeout": 0.5, "connect_timeout": 0.5, "deadline": 5.0, "attempts": 3, "in_flight": 2}
NAN = float("nan")


def truth(prompt, response):
    """A score that tells every text from every other."""
    return len(response) / 4 + ord(prompt[0]) / 100


def ours(_path, body):
    return {"model": "rm", "scores": [truth(text["prompt"], text["response"]) for text in body["texts"]]}


def written(text):
    prompt, response = text.split(" ", 1)
    return truth(prompt, response)


def vllm(path, body):
    assert body["model"] == "rm"
    assert body["use_activation"] is False
    column = {"/classify": "probs", "/pooling": "data"}[path]
    rows = [{"index": i, column: [written(text)]} for i, text in enumerate(body["input"])]
    return {"data": rows[::-1], "usage": {}}  # an order of its own: the index counts


def tei(path, body):
    assert path == "/predict"
    assert body["raw_scores"] is True
    return [[{"label": "LABEL_0", "score": written(text)}] for (text,) in body["inputs"]]


SERVERS = {
    "llm-duel": (ours, {}),
    "vllm-classify": (vllm, {"model": "rm"}),
    "vllm-pooling": (vllm, {"model": "rm"}),
    "tei": (tei, {}),
}
EXPECTED = np.array([truth(p, r) for p, r in zip(PROMPTS["prompt"] * 2, [*FIRST, *SECOND])])


@pytest.mark.parametrize("protocol", SERVERS)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_protocol_gives_the_scores_in_order(serve, protocol, batch):
    answer, extra = SERVERS[protocol]
    oracle = RemoteOracle(serve(answer).url, protocol=protocol, batch=batch, **QUICK, **extra)
    gap = EXPECTED[:4] - EXPECTED[4:]
    assert oracle.win_probability(PROMPTS, FIRST, SECOND) == pytest.approx(expit(gap), abs=1e-12)
    assert oracle.utility(PROMPTS, FIRST) == pytest.approx(EXPECTED[:4], abs=1e-12)
    assert oracle.rows_scored == 7  # ("p", "a") is there twice
    oracle.close()


def test_nothing_is_asked_twice(serve):
    server = serve(ours)
    oracle = RemoteOracle(server.url, batch=2, **QUICK)
    oracle.win_probability(PROMPTS, FIRST, SECOND)
    oracle.win_probability(PROMPTS, SECOND, FIRST)
    asked = [(text["prompt"], text["response"]) for body in server.seen for text in body["texts"]]
    assert len(asked) == len(set(asked)) == 7
    assert oracle.usage() == {"requests": 4.0, "scored": 7.0}


def without_last(answer):
    return answer | {"scores": answer["scores"][:-1]}


def doubled(answer):
    return answer | {"scores": answer["scores"] * 2}


def with_nan(answer):
    return answer | {"scores": [NAN, *answer["scores"][1:]]}


def with_infinity(answer):
    return answer | {"scores": [1e999, *answer["scores"][1:]]}


def with_many_digits(answer):
    return answer | {"scores": [10**400, *answer["scores"][1:]]}


def with_text(answer):
    return answer | {"scores": ["3", *answer["scores"][1:]]}


def renamed(answer):
    return {"results": answer["scores"]}


FAULTS = {
    "slow": ("slow", "no answer within 0.5 s"),
    "500": (500, "status 500: .*told to"),
    "503": (503, "status 503"),
    "half": ("half", "the connection broke"),
    "garbage": ("garbage", "no JSON: '<html>"),
    "deep": ("deep", r"no JSON: '\[\[\["),
    "nan": (with_nan, "expected a finite number, got nan"),
    "infinity": (with_infinity, "expected a finite number, got inf"),
    "many digits": (with_many_digits, r"expected a finite number, got 1000*\.\.\."),
    "too few": (without_last, r"expected 7 results, got 6"),
    "too many": (doubled, "expected 7 results, got 14"),
    "text": (with_text, "expected a number, got '3'"),
    "renamed": (renamed, "expected an object with 'model'"),
    "a list": (lambda _: [1], "expected an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived(serve, fault):
    server = serve(ours)
    server.faults = [FAULTS[fault][0]] * 2
    oracle = RemoteOracle(server.url, **QUICK)
    assert oracle.utility(PROMPTS, FIRST) == pytest.approx(EXPECTED[:4])
    assert oracle.client.requests == 3
    oracle.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_in_a_clear_error_and_no_label(serve, fault):
    server = serve(ours)
    server.faults = [FAULTS[fault][0]] * 3
    oracle = RemoteOracle(server.url, **QUICK)
    with pytest.raises(OracleError, match=rf"127.0.0.1.*3 tries.*{FAULTS[fault][1]}"):
        oracle.win_probability(PROMPTS, FIRST, SECOND)
    assert not oracle._cache
    assert oracle.win_probability(PROMPTS, FIRST, SECOND) == pytest.approx(expit(EXPECTED[:4] - EXPECTED[4:]))
    oracle.close()


@pytest.mark.parametrize(("status", "said"), [(400, "told to"), (401, "token"), (413, "told"), (404, "told")])
def test_what_another_try_cannot_mend_is_not_tried_again(serve, status, said):
    server = serve(ours)
    server.faults = [status]
    oracle = RemoteOracle(server.url, **QUICK)
    with pytest.raises(OracleError, match=f"refused: status {status}.*{said}"):
        oracle.utility(PROMPTS, FIRST)
    assert oracle.client.requests == 1
    oracle.close()


def test_a_server_that_is_not_there(serve):
    server = serve(ours)
    server.stop()
    oracle = RemoteOracle(server.url, **QUICK)
    with pytest.raises(OracleError, match=r"3 tries.*no connection"):
        oracle.utility(PROMPTS, FIRST)
    oracle.close()


def test_a_program_that_closes_nothing_ends(serve):
    code = """
import sys, numpy as np
from llm_duel_env.oracles.remote import RemoteOracle
oracle = RemoteOracle(sys.argv[1])
print(oracle.utility({"prompt": ("p",)}, np.array(["abcd"], object)))
"""
    done = subprocess.run([sys.executable, "-c", code, serve(ours).url], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"[{truth('p', 'abcd')}]\n"), done.stderr


def test_bytes_that_drip_in_meet_the_deadline(serve):
    server = serve(ours)
    server.faults = ["drip"] * 9
    oracle = RemoteOracle(server.url, **{**QUICK, "deadline": 0.6})
    begun = time.monotonic()
    with pytest.raises(OracleError, match=r"deadline of 0\.6 s"):
        oracle.utility(PROMPTS, FIRST)
    assert time.monotonic() - begun < 5
    oracle.close()


def test_too_long_an_answer_and_a_redirect_are_refused(serve):
    server = serve(ours)
    server.faults = ["huge", "redirect"]
    oracle = RemoteOracle(server.url, max_response_bytes=20_000, **QUICK)
    with pytest.raises(OracleError, match="more than 20000 bytes"):
        oracle.utility(PROMPTS, FIRST)
    with pytest.raises(OracleError, match="status 302"):
        oracle.utility(PROMPTS, FIRST)
    assert len(server.seen) == 2
    oracle.close()


def test_what_other_chunks_learnt_is_not_asked_again(serve):
    server = serve(ours)
    oracle = RemoteOracle(server.url, batch=1, **{**QUICK, "in_flight": 1})
    server.faults = [None, None, 400]
    with pytest.raises(OracleError, match="400"):
        oracle.utility(PROMPTS, FIRST)
    assert oracle.rows_scored == 2
    assert oracle.utility(PROMPTS, FIRST) == pytest.approx(EXPECTED[:4])
    answered = server.seen[:2] + server.seen[3:]
    assert len({json.dumps(body) for body in answered}) == len(answered) == 4
    oracle.close()


def test_another_model_behind_the_address_is_refused(serve):
    with pytest.raises(OracleError, match="expected the model 'mine', it serves 'rm'"):
        RemoteOracle(serve(ours).url, model="mine", **QUICK).utility(PROMPTS, FIRST)


@pytest.mark.parametrize("index", [[0, 0], [0, 2], [1, "0"], [[0], 1], [0, {}], [False, 1], [1, 10**400]])
def test_indices_of_vllm_are_checked(serve, index):
    server = serve(lambda path, body: {"data": [{"index": i, "probs": [1.0]} for i in index]})
    oracle = RemoteOracle(server.url, protocol="vllm-classify", model="rm", **QUICK)
    with pytest.raises(OracleError, match=r"expected (index 0 to 1|2 results)"):
        oracle.utility({"prompt": ("p", "q")}, np.array(["a", "b"], object))
    assert oracle.client.requests == QUICK["attempts"]
    oracle.close()


def test_an_error_shows_what_came_in_one_short_line():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "a deeply nested list"
    assert shown("a\n" * 200) == repr("a\n" * 200)[:197] + "..."
    assert shown(None) == "None"


def test_the_token_comes_from_the_environment_and_is_never_said(serve, monkeypatch):
    server = serve(ours)
    with pytest.raises(ValueError, match="environment variable DUEL_TOKEN"):
        RemoteOracle(server.url, token_env="DUEL_TOKEN")
    monkeypatch.setenv("DUEL_TOKEN", "s3cret")
    oracle = RemoteOracle(server.url, token_env="DUEL_TOKEN", **QUICK)
    oracle.utility(PROMPTS, FIRST)
    assert set(server.tokens) == {"Bearer s3cret"}
    server.faults = [403]
    with pytest.raises(OracleError) as error:
        oracle.utility(PROMPTS, np.array(["new"] * 4, object))
    assert "s3cret" not in str(error.value)
    assert "DUEL_TOKEN" in str(error.value)
    oracle.close()


def test_an_address_from_the_environment(serve, monkeypatch):
    with pytest.raises(ValueError, match="ORACLE_URL, which is not set"):
        RemoteOracle("$ORACLE_URL")
    monkeypatch.setenv("ORACLE_URL", serve(ours).url + "/")
    assert RemoteOracle("$ORACLE_URL", **QUICK).utility(PROMPTS, FIRST) == pytest.approx(EXPECTED[:4])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "127.0.0.1:80"}, "address like http"),
        ({"url": "ftp://x"}, "address like http"),
        ({"url": "http://me:pw@x"}, "without user and password"),
        ({"protocol": "grpc"}, "protocol: expected"),
        ({"protocol": "vllm-classify"}, "name under which vLLM"),
        ({"text_template": "{prompt} {response}"}, "expected none"),
        ({"protocol": "tei", "text_template": "{prompt}"}, "expected {response} in it"),
        ({"batch": 0}, "batch: expected"),
        ({"timeout": 3}, "timeout: no such setting"),
        ({"attempts": 0}, "attempts: expected"),
        ({"read_timeout": NAN}, "read_timeout: expected"),
        ({"deadline": "soon"}, "expected numbers"),
        ({"scale": -1}, "scale: expected"),
    ],
)
def test_wrong_settings_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        RemoteOracle(**{"url": "http://127.0.0.1:1", **arguments})


def labels(path):
    return [json.loads(line) for line in path.read_text().split("\n")[1:-1]]


def play(core, rounds):
    """Rounds of two duels whose responses tell the round."""
    while core.round < rounds:
        first = np.array([f"first {core.round} {i}" for i in range(2)], object)
        second = np.array([f"second one {core.round} {i}" * (i + 1) for i in range(2)], object)
        ids = core.prompt_ids(2)
        yield core.duel(ids, first, second, np.ones(2, bool))


def test_a_failed_oracle_is_not_charged_and_the_run_goes_on_without_loss(serve, text_task, tmp_path):
    server = serve(ours)
    oracle = RemoteOracle(server.url, **{**QUICK, "deadline": 2.0})
    task = text_task(oracle=oracle, no_reference=True)
    core = DuelCore(task, ledger=tmp_path / "ledger.jsonl", budget=12)
    core.reset(seed=1)
    rounds = play(core, 3)
    next(rounds)
    server.stop()
    with pytest.raises(OracleError, match="no usable answer"):
        next(rounds)
    assert core.query_count == 2 == len(labels(core.ledger.path))
    server.start()
    list(play(core, 3))
    core.close()
    assert core.query_count == 6
    check(labels(tmp_path / "ledger.jsonl"), task)


def test_a_restart_in_the_middle_of_a_run_loses_and_invents_nothing(serve, text_task, tmp_path):
    server = serve(ours)
    task = text_task(oracle=RemoteOracle(server.url, **{**QUICK, "attempts": 50, "deadline": 20.0}), no_reference=True)
    core = DuelCore(task, ledger=tmp_path / "ledger.jsonl", budget=40)
    core.reset(seed=1)
    stop, up = threading.Event(), [0.05]

    def restart():
        while not stop.wait(up[-1]):
            server.stop()
            time.sleep(0.05)
            server.start()
            up.append(1.3 * up[-1])  # a slow machine too gets its answers in at last

    worker = threading.Thread(target=restart)
    worker.start()
    try:
        list(play(core, 20))
    finally:
        stop.set()
        worker.join()
        core.close()
    found = labels(tmp_path / "ledger.jsonl")
    assert [record["query"] for record in found] == list(range(40))
    assert len(up) > 1
    check(found, task)


def check(found, task):
    """Every label is what the true scores say."""
    for record in found:
        gap = truth(record["prompt"], record["first"]) - truth(record["prompt"], record["second"])
        assert record["probability"] == pytest.approx(expit(gap))
        assert record["label"] == float(gap > 0)
