"""What a sweep chooses."""

import json

import pytest

from llm_duel_env.benchmark import stored, tuned
from llm_duel_env.benchmark.suite import expand

ENTRY = {
    "env": "duel/Synthetic-v0",
    "agents": ["online_dpo", "sea"],
    "seeds": [100, 101],
    "budget": 100,
    "sweep": {"policy.learning_rate": [0.01, 0.1, 1.0]},
    "variants": {"ipo": {"loss": "ipo"}},
}
CURVES = {"1e-2": ((0.5, 0.9), (0.5, 0.9)), "1e-1": ((0.7, 0.8), (0.7, 0.9)), "1e0": ((0.5, 0.5), (0.9, 0.9))}
"""Value -> seed's win rates at the beginning and at the end."""


def keep(folder, runs):
    for number, run in enumerate(runs):
        wins = CURVES[run.label.partition("@")[2]][run.seed - 100]
        told = {name: getattr(run, name) for name in ("agent", "label", "env", "env_kwargs", "seed", "budget", "batch")}
        told |= {"overrides": run.overrides, "eval_prompts": 512, "fingerprint": "now", "seconds": 30.0, "queries": 100}
        told |= {"curve": {"queries": [0, 100], "offline_win_rate": wins}}
        (folder / str(number)).mkdir()
        (folder / str(number) / "result.json").write_text(json.dumps(told))
    return stored.Kept(folder, lambda env, env_kwargs: stored.TaskFacts("now", 512))


def test_the_best_mean_curve_over_seeds_is_chosen_and_what_is_missing_decides_nothing(tmp_path):
    runs = expand({"name": "tune-x", "entries": [ENTRY]}, "out")
    kept = keep(tmp_path, runs[:-1])  # one seed of sea+ipo@1e0 is missing
    online, sea = tuned.choices(runs, kept)
    assert (online.task, online.label, sea.label) == ("Synthetic-v0", "online_dpo+ipo", "sea+ipo")
    assert online.means == pytest.approx({"1e-2": 0.7, "1e-1": 0.775, "1e0": 0.7})
    assert (online.best, sea.best) == ("1e-1", None)
    text = tuned.lines([online, sea])
    assert text[0] == "# Synthetic-v0"
    assert text[1].startswith("online_dpo+ipo: 1e-1  # 1e-2: 0.700, 1e-1: 0.775")
    assert text[2].startswith("sea+ipo: not played yet  #")
    assert kept.seconds_per_query("sea", "duel/Synthetic-v0") == pytest.approx(0.3)
    assert kept.seconds_per_query("xpo", "duel/Synthetic-v0") is None


def test_the_best_at_an_end_of_the_grid_is_said_and_a_suite_without_a_sweep_is_refused(tmp_path):
    one = tuned.Choice("Synthetic-v0", "sea", {"1e-2": 0.7, "1e-1": 0.6, "1e0": 0.5})
    assert "sea: 1e-2 (at an end of the grid)" in tuned.lines([one])[1]
    runs = expand({"name": "x", "entries": [{**ENTRY, "sweep": {}}]}, "out")
    with pytest.raises(ValueError, match="online_dpo\\+ipo: expected a run of a sweep"):
        tuned.choices(runs, keep(tmp_path, []))
