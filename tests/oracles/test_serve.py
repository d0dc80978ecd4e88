"""The oracle's server: one real one, started as a user starts it, and its gate alone."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

from llm_duel_env.extras import MissingExtraError
from llm_duel_env.oracles import serve as serving
from llm_duel_env.oracles.base import OracleError
from llm_duel_env.oracles.remote import RemoteOracle
from llm_duel_env.oracles.reward_model import RewardModelOracle
from llm_duel_env.oracles.serve import Gate, ServerSettings
from llm_duel_env.tasks.tiny_tldr import ASSETS

MODEL = str(ASSETS / "reward_model")
TOKEN = "a-token-that-is-long-enough"
SINGLE = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ORACLE_TOKEN": TOKEN}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port):
    command = [
        *(sys.executable, "-m", "llm_duel_env.cli", "serve-oracle", MODEL, "--port", str(port)),
        *("--token-env", "ORACLE_TOKEN", "--accelerator", "cpu", "--max-request-bytes", "20000"),
    ]
    return subprocess.Popen(command, env=SINGLE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_ready(port, process):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            if httpx2.get(f"http://127.0.0.1:{port}/health", headers=headers, timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.1)
    process.kill()  # else what it says has no end
    raise AssertionError(f"the server did not start: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("litserve")
    port = free_port()
    process = start(port)
    try:
        wait_until_ready(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 0
    assert "Traceback" not in said
    with socket.socket() as probe:  # nobody is left who listens
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.timeout(600)  # a server starts in seconds, unless a machine has better things to do
def test_the_served_scores_are_the_models_own_and_batches_keep_them_apart(server, monkeypatch):
    monkeypatch.setenv("ORACLE_TOKEN", TOKEN)
    url = f"http://127.0.0.1:{server}"
    local = RewardModelOracle(MODEL, device="cpu")
    words = ["the cat sat .", "a dog ran home .", "it rained .", "she sold the car ."]
    prompts = {"prompt": tuple(f"post : {a} {b}" for a in words for b in words)}
    responses = np.array([f"{words[i % 4]} {words[i // 4]}" for i in range(16)], object)
    expected = local.utility(prompts, responses)
    found = {}

    def ask(number):
        remote = RemoteOracle(url, token_env="ORACLE_TOKEN", model="reward_model", batch=3)
        order = np.random.default_rng(number).permutation(16)
        shuffled = {"prompt": tuple(prompts["prompt"][i] for i in order)}
        found[number] = remote.utility(shuffled, responses[order])[np.argsort(order)]
        remote.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for scores in found.values():
        assert scores == pytest.approx(expected, abs=1e-5)
    assert len(set(expected.round(4))) > 8


@pytest.mark.timeout(600)
def test_strangers_and_floods_are_turned_away(server, monkeypatch):
    url = f"http://127.0.0.1:{server}"
    body = {"texts": [{"prompt": "a", "response": "b"}]}
    right = {"Authorization": f"Bearer {TOKEN}"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        assert httpx2.post(f"{url}/score", json=body, headers=headers, timeout=20).status_code == 401
        assert httpx2.get(f"{url}/health", headers=headers, timeout=20).status_code == 401
    assert httpx2.post(f"{url}/score", json=body, headers=right, timeout=20).status_code == 200
    big = {"texts": [{"prompt": "a" * 20_000, "response": "b"}]}
    assert httpx2.post(f"{url}/score", json=big, headers=right, timeout=20).status_code == 413
    bad = httpx2.post(f"{url}/score", json={"texts": "a"}, headers=right, timeout=20)
    assert (bad.status_code, bad.json()["error"]) == (422, "texts: expected 1 to 256, got no list")
    monkeypatch.setenv("ORACLE_TOKEN", "some other token, also long")
    with pytest.raises(OracleError, match=r"401.*ORACLE_TOKEN"):
        RemoteOracle(url, token_env="ORACLE_TOKEN").utility({"prompt": ("a",)}, np.array(["b"], object))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "expected a token"),
        ({"host": "::"}, "expected a token"),
        ({"host": "example.org", "token_env": "X"}, "host: expected one of"),
        ({"port": 80}, "port: expected 1024"),
        ({"max_texts": 0}, "max_texts: expected"),
        ({"batch_wait": 0}, "batch_wait: expected"),
        ({"devices": 0}, "devices: expected"),
        ({"model": "/no/such/folder"}, "cannot load reward model"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ServerSettings(**{"model": MODEL, **settings})


def test_the_default_is_loopback():
    assert ServerSettings(MODEL).host == "127.0.0.1"


@pytest.mark.parametrize("token", [None, "", "short", "grüße grüße grüße"])
def test_a_token_that_is_none_is_refused_before_anything_listens(monkeypatch, token):
    pytest.importorskip("litserve")
    monkeypatch.delenv("ORACLE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("ORACLE_TOKEN", token)
    with pytest.raises(ValueError, match="at least 16 printable ASCII characters in the environment variable ORACLE"):
        serving.serve(ServerSettings(MODEL, host="0.0.0.0", token_env="ORACLE_TOKEN"))


def test_without_litserve_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "litserve", None)
    with pytest.raises((MissingExtraError, ModuleNotFoundError), match="serv"):
        serving.serve(ServerSettings(MODEL))


def through_gate(parts, *, headers=(), method="POST", token=None, **limits):
    """Status of a request whose body comes in `parts`, and what the app behind the gate was given (None: nothing)."""
    sent, seen = [], []
    coming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    coming.append({"type": "http.request", "body": b"", "more_body": False})

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return coming.pop(0)

    async def send(message):
        sent.append(message)

    gate = Gate(app, token=token, **{"max_bytes": 100, "max_texts": 2, **limits})
    asyncio.run(gate({"type": "http", "method": method, "headers": list(headers)}, receive, send))
    return sent[0]["status"], seen[0] if seen else None


GOOD = json.dumps({"texts": [{"prompt": "a", "response": "b"}]}).encode()


def test_the_gate_passes_what_is_good():
    assert through_gate([GOOD]) == (200, GOOD)
    assert through_gate([GOOD[:9], GOOD[9:]]) == (200, GOOD)
    paired = GOOD.replace(b'"a"', rb'"\ud83d\ude00"')
    assert through_gate([paired]) == (200, paired)
    assert through_gate([GOOD], token="t", headers=[(b"authorization", b"Bearer t")]) == (200, GOOD)


@pytest.mark.parametrize(
    ("status", "parts", "more"),
    [
        (401, [GOOD], {"token": "t"}),
        (401, [GOOD], {"token": "t", "headers": [(b"authorization", "Bearer ü".encode())]}),
        (413, [GOOD], {"headers": [(b"content-length", b"101")]}),
        (413, [GOOD], {"headers": [(b"content-length", b"many")]}),
        (413, [b"a" * 60, b"a" * 60], {}),
        (413, [b"a" * 60, b"a" * 60], {"headers": [(b"content-length", b"5")]}),
        (422, [b"no json"], {}),
        (422, [b"\xff"], {}),
        (422, [b"[" * 90], {}),
        (422, [b'"texts"'], {}),
        (422, [b'{"texts": []}'], {}),
        (422, [b'{"texts": [1]}'], {}),
        (422, [b'{"texts": [{"prompt": "a"}]}'], {}),
        (422, [b'{"texts": [{"prompt": "a", "response": 3}]}'], {}),
        (422, [GOOD.replace(b"[", b"[{},{},")], {}),
        (422, [GOOD.replace(b'"a"', rb'"\ud800"')], {}),
        (422, [GOOD.replace(b'"b"', b'"\xed\xa0\x80"')], {}),
    ],
)
def test_the_gate_turns_away_what_is_not(status, parts, more):
    assert through_gate(parts, **more) == (status, None)


def test_a_body_that_does_not_come_is_dropped(monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.05)
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    gate = Gate(None, token=None, max_bytes=9, max_texts=9)
    asyncio.run(gate({"type": "http", "method": "POST", "headers": []}, never, send))
    assert sent[0]["status"] == 408


def test_a_text_that_cannot_be_scored_does_not_spoil_the_others():
    pytest.importorskip("litserve")
    from llm_duel_env.oracles.serve_worker import ScoreAPI

    class Oracle:
        def score(self, texts):
            if any(response == "" for _, response in texts):
                raise OracleError("no tokens")
            return np.array([np.nan if response == "?" else len(response) for _, response in texts])

    api = ScoreAPI(ServerSettings(MODEL))
    api.oracle = Oracle()
    requests = [[("a", "xx"), ("a", "?")], [("a", "")], [("a", "xx"), ("b", "x")]]
    answers = [api.encode_response(output) for output in api.unbatch(api.predict(api.batch(requests)))]
    assert [answer["scores"] for answer in answers] == [[2.0, None], [None], [2.0, 1.0]]
    json.dumps(answers, allow_nan=False)
    assert Path(MODEL).name == answers[0]["model"]


@pytest.mark.parametrize("error", [TypeError, RuntimeError, OracleError])
def test_no_request_fails_another(error, caplog):
    pytest.importorskip("litserve")
    from llm_duel_env.oracles.serve_worker import ScoreAPI

    asked = []

    class Oracle:
        def score(self, texts):
            asked.append(len(texts))
            if any("bad" in response for _, response in texts):
                raise error("it broke")
            return np.array([float(len(response)) for _, response in texts])

    api = ScoreAPI(ServerSettings(MODEL))
    api.oracle = Oracle()
    requests = [[("a", "x"), ("b", "xx")], [("a", "bad"), ("a", "x")], [("c", "xxx")]]
    assert api.predict(requests) == [[1.0, 2.0], [None, 1.0], [3.0]]
    assert asked == [4, 2, 2, 1, 1, 1]  # together, then request by request, and the bad one text by text
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0] == f"could not score 4 texts of 3 requests: {error.__name__}: it broke"
