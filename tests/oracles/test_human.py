"""A person at the terminal: lines and single keys, skips that cost nothing, and going on later."""

import io
import json
import os
import pty
import signal
import threading
import time

import numpy as np
import pytest

from llm_duel_env.envs.core import DuelCore
from llm_duel_env.ledger import LedgerMismatch
from llm_duel_env.oracles.base import OracleError, OracleStopped
from llm_duel_env.oracles.human import HumanOracle

PROMPTS = {"prompt": ("p",), "prompt_id": np.arange(1)}


def texts(*values):
    return np.array(values, object)


def person(*lines, **more):
    """Someone who types these lines, and then leaves."""
    return HumanOracle(keys=io.StringIO("".join(f"{line}\n" for line in lines)), screen=io.StringIO(), **more)


def ask(oracle, first, second, prompt="p"):
    return oracle.win_probability({"prompt": (prompt,)}, texts(first), texts(second))[0]


def left_of(oracle):
    shown = oracle._screen.getvalue()
    return shown.split("LEFT\n")[1].split("\n")[0]


@pytest.mark.parametrize(("key", "wins"), [("1", 1), ("l", 1), ("L", 1), ("2", 0), ("r", 0), ("t", 0.5), ("=", 0.5)])
def test_keys(key, wins):
    oracle = person(key)
    given = ask(oracle, "a", "b")
    assert given == (wins if left_of(oracle) == "a" else 1 - wins)


def test_a_wrong_key_is_asked_again():
    oracle = person("x", "", "t")
    assert ask(oracle, "a", "b") == 0.5
    assert oracle._screen.getvalue().count("expected one of") == 2


def test_sides_are_tossed_by_the_texts_and_an_answer_counts_in_both_orders():
    sides = []
    for number in range(60):
        oracle = person("1")
        wins = ask(oracle, f"first {number}", f"second {number}")
        assert wins == 1 - ask(oracle, f"second {number}", f"first {number}")  # known: nobody is left to ask
        sides.append(wins)
    assert 15 < sum(sides) < 45


def test_the_screen_is_not_steered_by_what_a_model_wrote():
    oracle = person("t")
    ask(oracle, "a\x1b[2J\x07", "b\u202e", prompt="p\x1b]0;x\x07")
    shown = oracle._screen.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "a\\x1b[2J\\x07" in shown


def test_answers_are_kept_one_by_one_and_not_asked_again(tmp_path):
    first = person("1", "2")
    first.open(tmp_path)
    three = ({"prompt": ("p", "q", "r")}, texts("a", "c", "e"), texts("b", "d", "f"))
    with pytest.raises(OracleStopped, match=r"2 pairs are answered and kept in .*answers.jsonl"):
        first.win_probability(*three)
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b'{"key"')
    second = person("t")
    second.open(tmp_path)
    assert second.win_probability(*three).tolist()[2] == 0.5
    assert "1 of 1. PROMPT\nr" in second._screen.getvalue()
    assert second.usage() == {"answers": 3.0, "skipped": 0.0}


def test_q_and_the_end_of_the_input_stop():
    with pytest.raises(OracleStopped):
        ask(person("q"), "a", "b")
    with pytest.raises(OracleStopped):
        ask(person(), "a", "b")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"verdict": "A"}\n')
    with pytest.raises(OracleError, match="expected answers of a person"):
        person().open(tmp_path)


class Typist:
    """A terminal (a real pseudo-terminal) whose keys are pressed when the oracle waits for them."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.keys = os.fdopen(slave, "r")

    def press(self, *keys):
        for key in keys:
            time.sleep(0.15)
            os.write(self.master, key)


def on_terminal(*keys, pairs=1):
    typist = Typist()
    oracle = HumanOracle(keys=typist.keys, screen=io.StringIO())
    worker = threading.Thread(target=typist.press, args=keys)
    worker.start()
    try:
        one = {"prompt": tuple(f"p{i}" for i in range(pairs))}
        return oracle, oracle.win_probability(one, texts(*["a"] * pairs), texts(*["b"] * pairs))
    finally:
        worker.join()
        typist.keys.close()
        os.close(typist.master)


def test_single_keys_and_arrows_on_a_terminal():
    oracle, wins = on_terminal(b"1", b"\x1b[C", b"\x1b[D", b"t", pairs=4)
    answers = [entry["answer"] for entry in oracle._journal.entries]
    assert answers == ["left", "right", "left", "tie"]
    assert wins[3] == 0.5


def test_the_end_of_a_terminal_stops():
    with pytest.raises(OracleStopped):
        on_terminal(b"\x04")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_though_a_run_would_finish_its_round(number):
    asked = []
    before = {n: signal.signal(n, lambda *_: asked.append(1)) for n in (signal.SIGINT, signal.SIGTERM)}
    read, write = os.pipe()
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    try:
        with os.fdopen(read) as keys, pytest.raises(OracleStopped):
            ask(HumanOracle(keys=keys, screen=io.StringIO()), "a", "b")
        assert not asked
        signal.raise_signal(number)
        assert asked  # the run's own handler is back
    finally:
        os.close(write)
        for n, handler in before.items():
            signal.signal(n, handler)


def labels(path):
    return [json.loads(line) for line in path.read_text().split("\n")[1:-1]]


def play(core, rounds, size=3):
    outcomes = []
    while core.round < rounds:
        first = texts(*[f"first {core.round} {i}" for i in range(size)])
        second = texts(*[f"second {core.round} {i}" for i in range(size)])
        outcomes.append(core.duel(core.prompt_ids(size), first, second, np.ones(size, bool)))
    return outcomes


def start(text_task, path, oracle):
    core = DuelCore(text_task(oracle=oracle), ledger=path, budget=20)
    core.reset(seed=1)
    return core


ANSWERS = ("1", "s", "t", "s", "s", "s", "2", "1", "s")


def test_a_skip_is_no_label_and_costs_nothing(text_task, tmp_path):
    core = start(text_task, tmp_path / "ledger.jsonl", person(*ANSWERS))
    outcomes = play(core, 3)
    core.close()
    assert np.isnan([o.preference for o in outcomes]).tolist() == [
        [False, True, False],
        [True] * 3,
        [False, False, True],
    ]
    assert [o.charged.tolist() for o in outcomes] == [[True, False, True], [False] * 3, [True, True, False]]
    assert core.query_count == 4
    found = labels(tmp_path / "ledger.jsonl")
    assert [(r["query"], r["round"]) for r in found] == [(0, 0), (1, 0), (2, 2), (3, 2)]


@pytest.mark.parametrize("keep_answers", [True, False])
def test_a_run_with_skips_is_replayed_from_its_ledger(text_task, tmp_path, keep_answers):
    path = tmp_path / "ledger.jsonl"
    core = start(text_task, path, person(*ANSWERS))
    expected = play(core, 3)
    core.close()
    if not keep_answers:
        (tmp_path / "answers.jsonl").unlink()
    # Without the file of answers only what was skipped after the last label must be asked again.
    core = start(text_task, path, person() if keep_answers else person("s"))
    again = play(core, 3)
    core.close()
    for one, other in zip(expected, again):
        np.testing.assert_array_equal(one.preference, other.preference)
        np.testing.assert_array_equal(one.charged, other.charged)
    assert len(labels(path)) == 4


@pytest.mark.parametrize("given", range(len(ANSWERS)))
def test_a_run_stopped_anywhere_goes_on_and_asks_only_what_is_missing(text_task, tmp_path, given):
    path = tmp_path / "ledger.jsonl"
    core = start(text_task, path, person(*ANSWERS[:given]))
    with pytest.raises(OracleStopped):
        play(core, 3)
    core.close()
    rest = person(*ANSWERS[given:])
    core = start(text_task, path, rest)
    play(core, 3)
    core.close()
    assert rest._keys.read() == ""
    assert rest._screen.getvalue().count("PROMPT") == len(ANSWERS) - given
    whole = tmp_path / "whole" / "ledger.jsonl"
    core = start(text_task, whole, person(*ANSWERS))
    play(core, 3)
    core.close()
    assert path.read_bytes() == whole.read_bytes()


def test_a_run_that_does_not_repeat_itself_is_still_found_out(text_task, tmp_path):
    core = start(text_task, tmp_path / "ledger.jsonl", person("1", "1", "1"))
    play(core, 1)
    core.close()
    core = start(text_task, tmp_path / "ledger.jsonl", person())
    other = texts("x", "y", "z")
    core.duel(core.prompt_ids(3), other, texts("1", "2", "3"), np.ones(3, bool))  # all skipped, it seems
    with pytest.raises(LedgerMismatch):
        core.duel(core.prompt_ids(3), other, texts("1", "2", "3"), np.ones(3, bool))
    core.close()


def test_an_oracle_that_may_not_skip_is_refused_a_nan(text_task, counting_oracle):
    core = DuelCore(text_task(oracle=counting_oracle(lambda m: np.full(m, np.nan)), no_reference=True))
    core.reset(seed=1)
    with pytest.raises(OracleError, match="probabilities in"):
        play(core, 1)
    assert core.query_count == 0
