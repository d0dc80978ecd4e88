"""Results made by hand for the tests of the report, some of them with texts that want to do harm."""

import json

import numpy as np

QUERIES = list(range(0, 101, 10))
EVIL = "<script>window.hacked = true</script><img src=http://evil.example/x onerror='window.hacked = true'>"


def result(agent, seed, height, **changes):
    """A run that climbs from 0.5 to `height`, a little differently for each seed."""
    draw = np.random.default_rng(seed)
    wins = 0.5 + (height - 0.5) * np.minimum(1, np.array(QUERIES) / 60) + 0.01 * draw.random(len(QUERIES))
    curve = {"queries": QUERIES, "offline_win_rate": wins.round(4).tolist()}
    curve |= {"win_low": (wins - 0.02).tolist(), "win_high": (wins + 0.02).tolist()}
    curve |= {"kl": (np.array(QUERIES) / 50).tolist()}
    curve |= {"cumulative_regret": (np.array(QUERIES) * (1.2 - height)).tolist()}
    curve |= {"true_utility": (wins - 0.5).tolist(), "simple_regret": (1 - wins).tolist()}
    return {
        **{"agent": agent, "label": agent, "provenance": "paper", "needs": [], "env": "duel/Synthetic-v0"},
        **{"kind": "finite", "env_kwargs": {}, "feedback": "bernoulli", "overrides": {"policy.learning_rate": 0.01}},
        **{
            "seed": seed,
            "budget": 100,
            "queries": 100,
            "status": "finished",
            "curve": curve,
            "online_win_rate": height,
        },
        **{"cumulative_regret": float(100 * (1.2 - height)), "seconds": 2.0, "batch": 8, "eval_prompts": 24},
        **{"gradient_steps": 12, "ledger_sha256": "ab" * 32, "fingerprint": "cd" * 32},
        **{"time": {"act": 1.5, "act/x": 1.0}},
        **changes,
    }


def sample(**changes):
    """A sample duel."""
    return {
        **{"round": 3, "queries": 64, "prompt_id": 7, "prompt": "What is a duel?", "first": "A fight."},
        **{"second": "A cat."},
        **{"labelled_by": "oracle", "first_wins": 1.0, "same": False, "reason": "Thompson winner of member 7"},
        **{"belief": 0.81, "spread": 0.12, "oracle_probability": 0.9, "utility_first": 1.5, "utility_second": -0.25},
        **changes,
    }


def agents():
    """Label -> height and what differs: twelve agents, one of them with a hostile name and one that never climbs."""
    known = {f"agent_{i}": (0.9 - 0.01 * i, {}) for i in range(7)}
    return known | {
        "sea": (0.95, {"needs": []}),
        "online_dpo": (0.92, {}),
        "offline_dpo": (0.8, {"provenance": "reconstructed"}),
        "uniform": (0.5, {"provenance": "ours"}),
        f"bad{EVIL}": (0.7, {"overrides": {EVIL: EVIL}, "status": EVIL}),
    }


def world(folder, seeds=10):
    """Writes runs of all agents below `folder`, with a second environment and one that is told scores."""
    runs = [
        result(label, seed, height, **changes) for label, (height, changes) in agents().items() for seed in range(seeds)
    ]
    runs += [result("online_dpo", seed, 0.9, env="duel/TinyTLDR-v0", kind="text", batch=4) for seed in range(2)]
    runs += [result("pro", 0, 0.9, needs=["scores"], evaluations=200)]
    for number, run in enumerate(runs):
        path = folder / f"run-{number}"
        path.mkdir(parents=True)
        (path / "result.json").write_text(json.dumps(run))
        (path / "command.txt").write_text("llm-duel run --agent x\nllm-duel run --resume x\n")
        (path / "versions.json").write_text(json.dumps({"python": "3.11", "cpus": 2, "torch": EVIL, "commit": "f00"}))
        long = sample(first="x" * 3000, second="", first_wins=0.5)
        evil = sample(prompt=EVIL, first=EVIL, second="\u202egnihton", reason=EVIL, first_wins=0.0)
        own = sample(labelled_by="agent", oracle_probability=None, utility_first=None, utility_second=None)
        left = sample(labelled_by="nobody", first_wins=None, belief=None, spread=None, reason="")
        samples = [evil, long, sample(), own, long, left, long, long, long]  # of nine, 0, 2, 3, 5, 6 and 8 are shown
        (path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder
