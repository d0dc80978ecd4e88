"""Archives of finished runs: the same bytes, whole or refused, and never believed before they are checked."""

import json
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from benchmark_helpers import WORLD, config, sea, silent

from llm_duel_env import cli
from llm_duel_env.benchmark import archive
from llm_duel_env.benchmark.archive import SubmissionError
from llm_duel_env.benchmark.audit import REQUIRED, AuditError, audit
from llm_duel_env.benchmark.outcome import LENGTH_CONTROLLED
from llm_duel_env.benchmark.results import find_results
from llm_duel_env.benchmark.runner import run
from llm_duel_env.benchmark.submission import pack, read
from llm_duel_env.options import Leaderboard, Submit

TOLD = {"by": "A. Person", "description": "two agents, two seeds"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two agents with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        run(config(folder / "dpo" / f"seed-{seed}", seed=seed), say=silent)
        run(config(folder / "uniform" / f"seed-{seed}", seed=seed, agent="uniform", overrides={}), say=silent)
    return folder


@pytest.fixture(scope="module")
def packed(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "ours.zip"
    pack([runs], out, **TOLD)
    return out


def copied(runs, tmp_path):
    return Path(shutil.copytree(runs, tmp_path / "copy"))


def rewritten(packed, out, change):
    """The archive with its files, by name, as `change` leaves them."""
    with zipfile.ZipFile(packed) as old:
        files = {name: old.read(name) for name in old.namelist()}
    change(files)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in files.items():
            new.writestr(name, content)
    return out


def changed_json(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_same_runs_are_the_same_bytes(runs, packed, tmp_path):
    assert pack([runs / "uniform", runs / "dpo"], tmp_path / "again.zip", **TOLD)["by"] == "A. Person"
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(packed) as zipped:
        names = zipped.namelist()
        manifest = json.loads(zipped.read("manifest.json"))
        assert names == sorted(names)
        assert {Path(name).name for name in names} <= {"manifest.json", "samples.jsonl", *REQUIRED}
        for name, one in manifest["runs"].items():
            for file, facts in one["files"].items():
                content = zipped.read(f"runs/{name}/{file}")
                assert facts == {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    dpo, uniform = manifest["entries"]
    assert (dpo["label"], dpo["seeds"], dpo["budget"]) == ("online_dpo", [0, 1], 100)
    assert dpo["env_spec"]["kwargs"]["task_kwargs"] == WORLD["task_kwargs"]
    assert dpo["agent_config"]["policy"]["learning_rate"] == 1e-2
    assert uniform["agent_source"]["class"] == "llm_duel_env.baselines.uniform:Uniform"


def test_an_archive_gives_the_results_of_its_folders(runs, packed, tmp_path, capsys):
    told = sorted(find_results([runs])[0], key=lambda r: (r["label"], r["seed"]))
    found = sorted(find_results([packed])[0], key=lambda r: (r["label"], r["seed"]))
    places = ("folder", "archive", "member", "by")
    for mine, theirs in zip(told, found, strict=True):
        assert {n: v for n, v in mine.items() if n not in places} == {
            n: v for n, v in theirs.items() if n not in places
        }
    assert cli.carry_out(Leaderboard((packed,), tmp_path / "report")) == 0
    out = capsys.readouterr().out
    assert f"{packed}: runs by A. Person; hashes, ledgers, labels and figures fit together" in out
    assert "self-reported" in out
    assert "self-reported" in (tmp_path / "report" / "leaderboard.md").read_text()
    assert "self-reported" in (tmp_path / "report" / "leaderboard.csv").read_text()
    # An archive beside the folders that it was made of: the same runs, not twice as many.
    assert cli.carry_out(Leaderboard((runs, packed))) == 0


def test_the_command_packs_and_says_what(runs, tmp_path, capsys):
    told = Submit((runs,), tmp_path / "mine.zip", by="A. Person", description="x", check=(3,))
    assert cli.carry_out(told) == 0
    out = capsys.readouterr().out
    assert "3 of 3 rounds" in out
    assert "online_dpo on duel/Synthetic-v0: 100 queries, seeds [0, 1]" in out
    assert sha256((tmp_path / "mine.zip").read_bytes()).hexdigest() in out
    assert cli.carry_out(Submit((runs,), tmp_path / "mine.tar", by="A", description="x")) == 2
    assert "ends in .zip" in capsys.readouterr().err


def unfinished(copy):
    (copy / "dpo" / "seed-1" / "result.json").unlink()


def without_a_seed(copy):
    shutil.rmtree(copy / "dpo" / "seed-0")


def with_another_budget(copy):
    shutil.rmtree(copy / "dpo" / "seed-1")
    run(config(copy / "dpo" / "seed-1", seed=1, budget=40), say=silent)


def evaluated_less_often(copy):
    shutil.rmtree(copy / "dpo" / "seed-1")
    run(config(copy / "dpo" / "seed-1", seed=1, eval_every=0.5), say=silent)


def without_ledgers(copy):
    (copy / "dpo" / "seed-1" / "ledger.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unfinished, "expected finished runs, got 1 that are not"),
        (without_a_seed, r"expected the seeds 0, 1, got 1: seeds 0 are missing"),
        (with_another_budget, "budget: expected 40 as online_dpo, seed 1 has it, got 100|budget: expected 100 as"),
        (evaluated_less_often, r"eval_every: expected 0\.[15] as online_dpo, seed [01] has it, got 0\.[15]"),
        (without_ledgers, "got no ledger.jsonl"),
    ],
)
def test_what_does_not_belong_together_is_refused(runs, tmp_path, spoil, said):
    copy = copied(runs, tmp_path)
    spoil(copy)
    with pytest.raises(ValueError, match=said):
        pack([copy], tmp_path / "out.zip", **TOLD)
    assert not (tmp_path / "out.zip").exists()


def test_seeds_that_are_named_are_the_ones_wanted(runs, tmp_path):
    copy = copied(runs, tmp_path)
    without_a_seed(copy)
    shutil.rmtree(copy / "uniform" / "seed-0")
    with pytest.raises(SubmissionError, match="from 0 on"):
        pack([copy], tmp_path / "out.zip", **TOLD)
    assert pack([copy], tmp_path / "out.zip", seeds=[1], **TOLD)["seeds"] == [1]
    assert len(read(tmp_path / "out.zip").results) == 2
    with pytest.raises(SubmissionError, match="printable"):
        pack([runs], tmp_path / "out.zip", by="", description="x")


def of_one(runs):
    folder = runs / "dpo" / "seed-0"
    return {name: (folder / name).read_bytes() for name in REQUIRED}


def with_result(files, **changes):
    result = json.loads(files["result.json"])
    for name, value in changes.items():
        place, _, last = name.rpartition("__")
        (result[place] if place else result)[last] = value
    return files | {"result.json": json.dumps(result).encode()}


def with_ledger(files, change):
    """A ledger that was changed, and a result that knows its hash."""
    lines = [json.loads(line) for line in files["ledger.jsonl"].splitlines()]
    change(lines)
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return with_result(files | {"ledger.jsonl": content}, ledger_sha256=sha256(content).hexdigest())


def flip_a_label(lines):
    lines[5]["label"] = 1 - lines[5]["label"]


def test_files_of_a_run_that_fit_are_its_result(runs):
    files = of_one(runs)
    assert audit("x", files) == json.loads(files["result.json"])


def test_results_of_earlier_versions_lack_fields_and_are_taken(runs):
    files = of_one(runs)
    result = json.loads(files["result.json"])
    for name in ("evaluations", "labels", "beliefs", "length_controlled_win_rate", "generated_tokens", "eval_every"):
        del result[name]
    assert audit("x", files | {"result.json": json.dumps(result).encode()}) == {**result, "eval_every": 0.1}
    del result["gradient_steps"]  # which every version wrote
    with pytest.raises(AuditError, match="got no gradient_steps"):
        audit("x", files | {"result.json": json.dumps(result).encode()})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: with_result(f, queries=99), "expected rising queries that end at 99|its budget, got 99"),
        (lambda f: with_result(f, budget=90), "a finished run: expected 90 queries, its budget, got 100"),
        (lambda f: with_result(f, seed=7), "seed: expected 3|seed: expected 0"),
        (lambda f: with_result(f, ledger_sha256="0" * 64), "expected the hash 0000"),
        (lambda f: with_result(f, cumulative_regret=1.0), "cumulative_regret: expected"),
        (lambda f: with_result(f, online_win_rate=0.99), "online_win_rate: expected"),
        (lambda f: with_result(f, rounds=3), "expected a label of a duel|expected 3 rounds"),
        (lambda f: with_result(f, label="[red]x"), "label: expected a name without"),
        (lambda f: with_result(f, needs="scores"), "needs: expected a list of names"),
        (
            lambda f: with_result(f, gradient_steps=1),
            r"gradient_steps: expected \d\d, as of metrics.jsonl, added up, got 1",
        ),
        (lambda f: with_result(f, seconds=0.0001), "seconds: expected at least .* got 0.0001"),
        (
            lambda f: with_result(f, evaluations=9),
            "evaluations: expected 0, as of an agent that is told of none, got 9",
        ),
        (lambda f: with_result(f, labels__flipped=0), "labels: expected .*'flipped': 1"),
        (lambda f: with_result(f, labels__identical=0), "labels: expected "),
        (
            lambda f: with_result(f, beliefs={"queries": [0], "believed": [0.9]}),
            "beliefs: expected None, as of the eval",
        ),
        (lambda f: with_result(f, generated_tokens=5), "generated_tokens: expected None, as of a finite task, got 5"),
        (
            lambda f: with_result(f, length_controlled_win_rate=0.9),
            "length_controlled_win_rate: expected None, as of the",
        ),
        (
            lambda f: with_result(f, length_controlled_win_rate=9.9),
            "length_controlled_win_rate: expected a share or null",
        ),
        (lambda f: with_result(f, eval_every=0.5), "eval_every: expected 0.1 as config.json has it, got 0.5"),
        (
            lambda f: with_result(f, length_controlled_win_rate="high"),
            "length_controlled_win_rate: expected a share or",
        ),
        (lambda f: with_result(f, evaluations="many"), "evaluations: expected a count, got 'many'"),
        (lambda f: with_result(f, seconds=10**400), "seconds: expected a number of at least 0"),
        (lambda f: with_result(f, beliefs=[1]), "beliefs: expected a mapping of lists"),
        (lambda f: with_result(f, beliefs={"queries": [0], "believed": []}), "beliefs: believed: expected 1 values"),
        (lambda f: with_result(f, agent_config=["x"]), "agent_config: expected a mapping"),
        (lambda f: with_result(f, versions=["x"]), "versions: expected a mapping"),
        (lambda f: with_result(f, env_kwargs={"task_kwargs": [1]}), "env_kwargs: expected a mapping, with a mapping"),
        (
            lambda f: f | {"config.json": b'{"agent": "x", "env": "y", "folder": "", "eval_every": "z"}'},
            "expected a run's",
        ),
        (
            lambda f: with_result(f, curve__offline_win_rate=[0.99] * len(json.loads(f["result.json"])["curve"]["kl"])),
            "no such evaluation",
        ),
        (lambda f: with_result(f, curve__offline_win_rate=[0.5]), "offline_win_rate: expected 11 values"),
        (lambda f: with_ledger(f, flip_a_label), r"query 4: expected the label .* as bernoulli feedback"),
        (
            lambda f: with_ledger(f, lambda lines: lines.pop()),
            "expected 100 labels, the queries of result.json, got 99",
        ),
        (lambda f: with_ledger(f, lambda lines: lines[0]["header"].update(seed=9)), "header: seed: expected 0, got 9"),
        (
            lambda f: with_ledger(f, lambda lines: lines[3].update(second=lines[3]["first"])),
            "query 2: expected a label",
        ),
        (lambda f: f | {"ledger.jsonl": f["ledger.jsonl"][:-5]}, "bytes of a torn one"),
        (lambda f: f | {"metrics.jsonl": b"\n".join(f["metrics.jsonl"].split(b"\n")[:4]) + b"\n"}, "rounds, got"),
        (lambda f: f | {"result.json": b'{"agent": NaN}'}, "expected finite numbers"),
        (lambda f: f | {"result.json": b"[" * 100_000}, "expected JSON"),
        (lambda f: {name: content for name, content in f.items() if name != "metrics.jsonl"}, "got no metrics.jsonl"),
    ],
)
def test_figures_that_the_ledger_and_the_metrics_deny_are_refused(runs, spoil, said):
    with pytest.raises(AuditError, match=said):
        audit("x", spoil(of_one(runs)))


def test_totals_follow_from_the_files_whatever_the_agent_is_told(tmp_path):
    """Beliefs, a lesson that is learnt in the background, scores, and tokens on a task of text."""
    text = {"env": "duel/TinyTLDR-v0", "env_kwargs": {}, "budget": 6, "batch": 3, "eval_prompts": 6, "eval_every": 0.5}
    for told, names in (
        (sea(tmp_path / "sea"), ["beliefs", "gradient_steps", "labels"]),
        (config(tmp_path / "background", overrides={"policy.asynchronous": True}), ["gradient_steps"]),
        (config(tmp_path / "scores", agent="rdo", overrides={}), ["evaluations"]),
        (config(tmp_path / "text", overrides={}, **text), ["length_controlled_win_rate", "generated_tokens"]),
    ):
        run(told, say=silent)
        files = {name: Path(told.folder, name).read_bytes() for name in REQUIRED}
        result = audit("x", files)
        for name in names:
            assert result[name]
            raised = {"beliefs": None, "labels": {}, LENGTH_CONTROLLED: 0.999}.get(name, 10_000)
            with pytest.raises(AuditError, match=f"{name}: expected"):
                audit("x", with_result(files, **{name: raised}))
        lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        for line in lines[1:]:  # as earlier versions wrote them
            for name in {"evaluations", "generated_tokens"} & set(line):
                del line[name]
            if line["kind"] == "eval":
                line.pop("agent/gradient_steps", None)
        old = files | {"metrics.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines)}
        assert audit("x", old) == result


def test_a_truncated_archive_is_refused(packed, tmp_path):
    whole, torn = packed.read_bytes(), tmp_path / "torn.zip"
    for length in range(0, len(whole), len(whole) // 20):
        torn.write_bytes(whole[:length])
        with pytest.raises(SubmissionError, match="truncated"):
            read(torn)
    assert cli.carry_out(Leaderboard((torn,))) == 2


def test_no_changed_byte_changes_a_figure(packed, tmp_path):
    """Every change is refused, or is of a byte that says nothing (a date in a zip's header)."""
    whole, changed = packed.read_bytes(), tmp_path / "changed.zip"
    wanted, refused = [r["curve"] for r in read(packed).results], 0
    for place in range(11, len(whole), len(whole) // 60):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            assert [r["curve"] for r in read(changed).results] == wanted
        except ValueError:
            refused += 1
    assert refused >= 50


def edited_manifest(name, value):
    def change(files):
        manifest = json.loads(files["manifest.json"])
        manifest[name] = value(manifest[name])
        files["manifest.json"] = json.dumps(manifest).encode()

    return change


def resealed_result(files):
    """A result that was raised, in an archive whose manifest was made to fit."""
    name = next(name for name in files if name.endswith("result.json"))
    result = json.loads(files[name])
    result["curve"]["offline_win_rate"][-1] = 0.999
    files[name] = json.dumps(result).encode()
    manifest = json.loads(files["manifest.json"])
    facts = {"sha256": sha256(files[name]).hexdigest(), "bytes": len(files[name])}
    manifest["runs"][name.removeprefix("runs/").removesuffix("/result.json")]["files"]["result.json"] = facts
    files["manifest.json"] = json.dumps(manifest).encode()


def spoiled(files):
    name = next(name for name in files if name.endswith("command.txt"))
    files[name] += b"llm-duel run --agent another\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited_manifest("entries", lambda e: [{**e[0], "budget": 50}, *e[1:]]), "manifest: entries: altered"),
        (edited_manifest("format", lambda _: 2), "manifest of format 1, got 2"),
        (edited_manifest("runs", lambda r: dict(list(r.items())[1:])), "expected the files that the manifest names"),
        (edited_manifest("seeds", lambda _: [5]), "expected the seeds 5"),
        (edited_manifest("seeds", lambda _: 5), "manifest: seeds: expected a list of counts, got 5"),
        (edited_manifest("seeds", lambda _: [{}]), r"manifest: seeds: expected a list of counts, got \[\{\}\]"),
        (spoiled, "altered: expected"),
        (resealed_result, "no such evaluation"),
        (lambda files: files.pop("manifest.json"), r"a zip without manifest\.json"),
        (lambda files: files.update({"../../evil.json": b"{}"}), "expected files of runs alone"),
        (lambda files: files.update({"/etc/evil.json": b"{}"}), "expected files of runs alone"),
        (lambda files: files.update({"runs/../seed-0/result.json": b"{}"}), "expected files of runs alone"),
        (lambda files: files.update({"runs/x/seed-0/agent.pkl": b"{}"}), "expected files of runs alone"),
        (
            lambda files: files.update({"runs/x/seed-0/result.json": b"{}"}),
            "expected the files that the manifest names",
        ),
    ],
)
def test_an_altered_archive_is_refused(packed, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        read(rewritten(packed, tmp_path / "changed.zip", change))
    assert [path.name for path in tmp_path.iterdir()] == ["changed.zip"]  # nothing was unpacked


def test_a_bomb_is_refused_before_it_is_unpacked(packed, tmp_path, monkeypatch):
    def swollen(files):
        files["runs/x/seed-0/ledger.jsonl"] = b" " * 4_000_000

    bomb = rewritten(packed, tmp_path / "bomb.zip", swollen)
    assert bomb.stat().st_size < packed.stat().st_size + 10_000
    monkeypatch.setattr(archive, "LARGEST_FILE", 1_000_000)
    monkeypatch.setattr(archive, "content_of", None)  # nothing may be read
    with pytest.raises(SubmissionError, match="expected at most 1000000 bytes, got 4000000"):
        read(bomb)
    monkeypatch.setattr(archive, "LARGEST_FILE", 8_000_000)
    monkeypatch.setattr(archive, "LARGEST", 2_000_000)
    with pytest.raises(SubmissionError, match="bytes in all"):
        read(bomb)
    monkeypatch.setattr(archive, "MOST_RUNS", 1)
    with pytest.raises(SubmissionError, match="at most 1 runs"):
        read(bomb)


def test_a_file_that_lies_about_its_size_gives_no_more_than_it_says(packed, tmp_path):
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("manifest.json", b" " * 1_000_000)
    raw = path.read_bytes()
    size = (1_000_000).to_bytes(4, "little")
    assert raw.count(size) == 2  # in the file's header and in the directory
    path.write_bytes(raw.replace(size, (50).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=r"altered|expected JSON|bytes"):
        read(path)
