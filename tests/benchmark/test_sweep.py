"""Many runs: in parallel, restartable, and one that breaks does not stop the rest."""

import dataclasses
import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from benchmark_helpers import config, silent, untimed

from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.sweep import sweep
from llm_duel_env.benchmark.sweep_runs import play


def test_a_sweep_goes_on_past_what_breaks_and_can_be_repeated(tmp_path):
    runs = [config(tmp_path / f"seed-{s}", seed=s, agent="uniform", overrides={}) for s in range(3)]
    # A ledger of another run in its folder: refused when the run begins.
    broken = config(tmp_path / "broken", agent="uniform", overrides={})
    Path(broken.folder).mkdir()
    Path(broken.folder, "ledger.jsonl").write_text('{"header": {}}\n')
    run(runs[0], say=silent)
    before = Path(runs[0].folder, "result.json").stat().st_mtime_ns
    lines = []
    outcome = sweep([broken, *runs], jobs=2, say=lines.append)
    assert sorted(outcome.finished) == sorted(r.folder for r in runs)
    assert list(outcome.broken) == [broken.folder]
    assert "choose another folder" in outcome.broken[broken.folder]
    assert any(line.startswith("broken: ") for line in lines)
    assert "3/4 runs over, 1 broken" in lines[-1]
    assert Path(runs[0].folder, "result.json").stat().st_mtime_ns == before  # finished: skipped
    alone = dataclasses.replace(runs[1], folder=str(tmp_path / "alone"))
    run(alone, say=silent)
    assert untimed(alone.folder) == untimed(runs[1].folder)
    again = sweep(runs, jobs=2, say=silent)
    assert (len(again.finished), again.broken) == (3, {})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[]", "config.json: expected a JSON object, got '[]'"),
        ("config.json", "{}", "config.json: expected a run's configuration"),
        ("config.json", '{"agent": 5, "env": "x"}', "agent: expected a text, got 5"),
        ("result.json", "[]", "result.json: expected the result of a run, got '[]'"),
        ("result.json", "{}", "result.json: expected the result of a run, got '{}'"),
        (
            "result.json",
            '{"agent": "x", "env": "x", "seed": 0, "status": "x", "curve": 5}',
            "curve: expected a mapping",
        ),
        ("result.json", "no JSON", "result.json is not JSON"),
    ],
)
def test_a_damaged_folder_is_told_and_the_rest_goes_on(tmp_path, name, content, said):
    damaged, well = (config(tmp_path / each, agent="uniform", overrides={}) for each in ("damaged", "well"))
    run(damaged, say=silent)
    run(well, say=silent)
    Path(damaged.folder, name).write_text(content)
    outcome = sweep([damaged, well], jobs=1, say=silent)
    assert outcome.finished == [well.folder]
    assert said in outcome.broken[damaged.folder]
    if name == "config.json":  # as of a run that is begun and not over
        Path(damaged.folder, "result.json").unlink()
        assert said in play(json.dumps(dataclasses.asdict(damaged)))


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    told = config(tmp_path / "run", agent="uniform", overrides={})
    run(told, say=silent)
    changed = dataclasses.replace(told, budget=told.budget + 1)  # as when a suite or a recipe was edited
    outcome = sweep([changed], jobs=1, say=silent)
    assert outcome.finished == []
    assert "budget: it has 100, asked for 101" in outcome.broken[told.folder]


def test_a_run_on_other_weights_is_neither_resumed_nor_taken_for_finished(tmp_path, monkeypatch):
    from llm_duel_env.tasks.synthetic import Synthetic

    told = config(tmp_path / "run", agent="uniform", overrides={})
    result = run(told, say=silent)
    header = json.loads(Path(told.folder, "ledger.jsonl").read_text().splitlines()[0])["header"]
    versions = json.loads(Path(told.folder, "versions.json").read_text())
    assert result["fingerprint"] == header["fingerprint"] == versions["fingerprint"]
    assert sweep([told], jobs=1, say=silent).finished == [told.folder]
    monkeypatch.setattr(Synthetic, "fingerprint", lambda self: "f" * 64)
    assert "stored responses have changed since" in sweep([told], jobs=1, say=silent).broken[told.folder]
    Path(told.folder, "result.json").unlink()
    with pytest.raises(ValueError, match="now ffffffffffff"):
        run(told, resume=True, say=silent)


def test_a_folder_that_cannot_be_made_is_no_end_of_the_worker(tmp_path):
    (tmp_path / "file").touch()
    told = json.dumps(dataclasses.asdict(config(tmp_path / "file" / "run", agent="uniform", overrides={})))
    assert "Not a directory" in play(told)


def test_a_worker_that_dies_takes_only_its_run_with_it(tmp_path, monkeypatch):
    # A module that Python loads at start, and that kills the process when this run's folder is made.
    site = tmp_path / "site"
    site.mkdir()
    doomed = tmp_path / "doomed"
    (site / "sitecustomize.py").write_text(
        "import os, sys, signal\n"
        "def hook(event, args):\n"
        f"    if event == 'open' and str(args[0]).startswith({str(doomed)!r}) and 'ledger' in str(args[0]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    runs = [config(folder, agent="uniform", overrides={}) for folder in (doomed, tmp_path / "well")]
    outcome = sweep(runs, jobs=1, say=silent)
    assert outcome.finished == [runs[1].folder]
    assert "died (exit code -9)" in outcome.broken[runs[0].folder]
    assert json.loads(Path(runs[1].folder, "result.json").read_text())["queries"] == 100


@pytest.mark.slow
def test_a_worker_stopped_from_outside_is_said_and_the_rest_goes_on(tmp_path):
    long = config(tmp_path / "long", agent="uniform", overrides={}, budget=1_000_000, batch=2, eval_every=1.0)
    short = config(tmp_path / "short", agent="uniform", overrides={})

    def stop_the_worker():
        metrics, deadline = Path(long.folder, "metrics.jsonl"), time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.05)
        multiprocessing.active_children()[0].terminate()

    thread = threading.Thread(target=stop_the_worker)
    thread.start()
    outcome = sweep([long, short], jobs=1, say=silent)
    thread.join()
    assert "stopped from outside" in outcome.broken[long.folder]
    assert outcome.finished == [short.folder]
    assert not outcome.stopped
    assert Path(long.folder, "checkpoint", "state.json").exists()
