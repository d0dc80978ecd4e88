"""Many runs: in parallel, restartable, and one that breaks does not stop the rest."""

import dataclasses
import json
from pathlib import Path

from benchmark_helpers import config, silent, untimed

from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.sweep import sweep


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


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    told = config(tmp_path / "run", agent="uniform", overrides={})
    run(told, say=silent)
    changed = dataclasses.replace(told, budget=told.budget + 1)  # as when a suite or a recipe was edited
    outcome = sweep([changed], jobs=1, say=silent)
    assert outcome.finished == []
    assert "budget: it has 100, asked for 101" in outcome.broken[told.folder]


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
