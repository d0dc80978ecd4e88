"""Pools: read, cleaned, cut, embedded, written, played, on small data made here; a real one where it is at hand."""

import gzip
import json
import os
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from scipy.special import logit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from llm_duel_env import cli
from llm_duel_env.benchmark.run_config import RunConfig, task_of
from llm_duel_env.benchmark.runner import run
from llm_duel_env.pools import build_pool, encode
from llm_duel_env.tasks.fingerprint import digest
from llm_duel_env.tasks.pool import Pool
from llm_duel_env.tasks.pool_files import (
    PRESETS,
    Columns,
    MalformedRow,
    NoPoolError,
    cut,
    read_pool,
    read_rows,
    share_of_ties,
)

PROMPTS, K = 25, 6


def row(number, count=K):
    draw = np.random.default_rng(number)
    return {
        "prompt": f"Frage {number}: wie geht's? 猫",
        "responses": [f"answer {k} to {number}" for k in range(count)],
        "scores": draw.normal(size=count).round(3).tolist(),
        "sources": [f"model {k}" for k in range(count)],
    }


def write(path, rows):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def embeddings(path, rows, count=K, size=5):
    draw = np.random.default_rng(1)
    np.savez(path, prompt=draw.normal(size=(rows, size)), response=draw.normal(size=(rows, count, size)))
    return path


@pytest.fixture
def folder(tmp_path):
    rows = [row(n) for n in range(PROMPTS)]
    vectors = embeddings(tmp_path / "e.npz", PROMPTS)
    out = tmp_path / "pool"
    build_pool(
        write(tmp_path / "d.jsonl", rows), out, Columns(sources="sources"), embeddings=vectors, say=lambda _: None
    )
    return out


def test_a_pool_holds_what_was_read(folder, tmp_path):
    pool = read_pool(folder)
    assert (pool.facts["prompts"], pool.facts["candidates"], pool.facts["dimension"]) == (PROMPTS, K, 5)
    assert pool.prompts[3] == row(3)["prompt"]
    assert pool.responses[3].tolist() == row(3)["responses"]
    np.testing.assert_array_equal(pool.utilities[3], row(3)["scores"])
    with np.load(tmp_path / "e.npz") as given:
        np.testing.assert_allclose(pool.response_embeddings, given["response"], atol=2e-3)  # half precision
    assert pool.facts["ties"] == 0.0
    (folder / "pool.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="its files are not those"):
        read_pool(folder)
    with pytest.raises(ValueError, match="llm-duel pool"):
        read_pool(tmp_path / "none")


def test_repeated_texts_stand_once_and_prompts_are_cut_to_one_size():
    rows = [row(0), row(1), row(0), row(2, 4), row(3, 9)]
    rows[1]["responses"][4] = rows[1]["responses"][1]
    found, left = read_rows(rows, Columns(), "x")
    assert [len(one.responses) for one in found] == [6, 5, 4, 9]
    assert (left.repeated_prompts, left.repeated_responses) == (1, 1)
    twice = np.mean([rows[1]["scores"][1], rows[1]["scores"][4]])
    assert found[1].utilities.tolist() == [rows[1]["scores"][0], twice, *(rows[1]["scores"][k] for k in (2, 3, 5))]
    assert found[1].place.tolist() == [0, 1, 2, 3, 5]
    assert found[3].number == 5
    kept, told = cut(found, None, left)  # 4 x 4 responses are more than 3 x 5, 2 x 6 and 1 x 9
    assert [len(one.responses) for one in kept] == [4] * 4
    assert (told.short_prompts, told.spare_responses) == (0, 8)
    kept, told = cut(found, 6, left)
    assert [one.number for one in kept] == [1, 5]
    assert (told.short_prompts, told.spare_responses) == (2, 3)
    for one in kept:
        place = {text: k for k, text in enumerate(rows[one.number - 1]["responses"])}
        assert [place[text] for text in one.responses] == sorted(place[text] for text in one.responses)
        assert one.utilities.tolist() == [rows[one.number - 1]["scores"][place[text]] for text in one.responses]
    for wrong in (1, 10):
        with pytest.raises(ValueError, match=rf"expected 2 to 9.* got {wrong}"):
            cut(found, wrong, left)


def test_scores_of_all_kinds_become_logits():
    made = {"prompt": "p", "responses": ["a", "b", "c"]}
    (read,), _ = read_rows([{**made, "scores": [0, 0.25, 1]}], Columns(scale="probability"), "x")
    np.testing.assert_allclose(read.utilities, [logit(1e-4), logit(0.25), logit(1 - 1e-4)])
    (read,), _ = read_rows([{**made, "scores": [1, 3, 2]}], Columns(scale="rank", logits=0.5), "x")
    assert read.utilities.tolist() == [-0.5, -1.5, -1.0]
    nested = {"instruction": "p", "completions": [
        {"response": "a", "overall_score": 7, "model": "m"}, {"response": "b", "overall_score": 1.5, "model": "n"},
    ]}  # fmt: skip
    (read,), _ = read_rows([nested], PRESETS["ultrafeedback"], "x")
    assert (read.responses, read.utilities.tolist(), read.sources) == (("a", "b"), [7.0, 1.5], ("m", "n"))
    assert share_of_ties(np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 2.0]])) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": " "}, "prompt: expected a text that is not empty"),
        ({"responses": []}, "responses: expected a list of texts"),
        ({"responses": ["a", None]}, "responses, number 2: expected a text, got None"),
        ({"responses": ["a", "\ud800"]}, "responses, number 2"),
        ({"scores": [1.0]}, "scores: expected 2, one for each response, got 1"),
        ({"scores": [1.0, float("nan")]}, "scores, number 2: expected a number between"),
        ({"scores": [1.0, "good"]}, "scores, number 2: expected a number between"),
        ({"scores": [1.0, 1e308]}, "scores, number 2: expected a number between"),
        ({"scores": [1.0, 10**400]}, "scores, number 2: expected a number between"),
        ({"scores": None}, "scores"),
    ],
)
def test_a_malformed_row_is_named(changes, told):
    rows = [row(0), {**row(1, 2), **changes}]
    with pytest.raises(MalformedRow, match=f"data, row 2: {told}"):
        read_rows(rows, Columns(), "data")
    with pytest.raises(MalformedRow, match=r"data, row 1: no column 'prompt'"):
        read_rows([{"text": "a"}], Columns(), "data")


def test_folds_are_a_cross_validation(folder):
    tasks = [Pool(folder, fold=fold) for fold in range(5)]
    held = [{task.texts(np.array([i]), np.array([0]))[0][0] for i in task.heldout_ids} for task in tasks]
    assert [len(one) for one in held] == [5] * 5
    assert len(set.union(*held)) == PROMPTS
    by_prompt = {}
    for task in tasks:
        ids = np.arange(PROMPTS)
        for i, k in zip(ids, task.reference(ids)):
            by_prompt.setdefault(task.texts([i], [0])[0][0], set()).add(int(k))
    assert all(len(references) == 1 for references in by_prompt.values())  # whatever the fold
    assert tasks[0].fingerprint() == tasks[1].fingerprint()
    for wrong in ({"fold": 5}, {"folds": 1}, {"folds": PROMPTS + 1}):
        with pytest.raises(ValueError, match="folds"):
            Pool(folder, **wrong)
    with pytest.raises(ValueError, match="oracle_scale"):
        Pool(folder, oracle_scale=0)


def test_folds_are_of_one_size(folder):
    tasks = [Pool(folder, fold=fold, folds=4) for fold in range(4)]
    held = [{task.texts(np.array([i]), np.array([0]))[0][0] for i in task.heldout_ids} for task in tasks]
    assert [len(one) for one in held] == [6] * 4  # of 25 prompts; one is always trained on
    assert len(set.union(*held)) == 24
    assert {task.train_prompts for task in tasks} == {19}


def test_the_task_tells_the_pool(folder):
    task = Pool(folder, oracle_scale=2.0)
    vectors = read_pool(folder).response_embeddings
    ids = task.heldout_ids[:3]
    observation = task.observe(ids)
    utilities = np.stack([task.utility(observation, np.full(3, k)) for k in range(K)], axis=1)
    np.testing.assert_array_equal(task.optimum(ids), 2 * utilities.max(axis=1))
    win = task.oracle.win_probability(observation, np.zeros(3, int), np.ones(3, int))
    np.testing.assert_allclose(win, 1 / (1 + np.exp(-2 * (utilities[:, 0] - utilities[:, 1]))))
    for k in range(K):  # text, utility and vector of a candidate are of one response, whatever its number
        prompt, response = task.texts(ids, np.array([k, 0, 1]))[0]
        number, place = int(prompt.split()[1].rstrip(":")), int(response.split()[1])
        assert response == f"answer {place} to {number}"
        assert utilities[0, k] == row(number)["scores"][place]
        np.testing.assert_array_equal(observation["candidates"][0, k], vectors[number, place])


def test_the_number_of_a_candidate_says_nothing(folder):
    task, other = Pool(folder), Pool(folder, fold=1)
    ids = np.arange(PROMPTS)
    places = {task.texts([i], [0])[0][0]: [int(t.split()[1]) for _, t in task.texts([i] * K, range(K))] for i in ids}
    assert all(sorted(order) == list(range(K)) for order in places.values())
    assert len({tuple(order) for order in places.values()}) > PROMPTS / 2
    again = {other.texts([i], [0])[0][0]: [int(t.split()[1]) for _, t in other.texts([i] * K, range(K))] for i in ids}
    assert places == again  # the same in every fold


def test_a_pool_is_found_by_the_environment_variable(folder, monkeypatch):
    monkeypatch.delenv("LLM_DUEL_POOL", raising=False)
    with pytest.raises(NoPoolError, match=r"task_kwargs.folder or the environment variable LLM_DUEL_POOL"):
        Pool()
    monkeypatch.setenv("LLM_DUEL_POOL", str(folder))
    assert Pool().fingerprint() == Pool(folder).fingerprint()
    with pytest.raises(ValueError, match="got 5 and 'by_seed'"):
        Pool(fold="by_seed")  # the runner makes a number of it


def test_a_seed_has_its_fold_and_the_result_does_not_say_where_the_pool_lies(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_DUEL_POOL", str(folder))
    results = []
    for seed in (1, 6, 7):
        told = RunConfig(
            agent="uniform", env="duel/Pool-v0", folder=str(tmp_path / f"run-{seed}"), budget=20, batch=10, seed=seed,
            env_kwargs={"task_kwargs": {"fold": "by_seed"}}, eval_every=1.0,
        )  # fmt: skip
        results.append(run(told, say=lambda _: None))
        header = json.loads((tmp_path / f"run-{seed}" / "ledger.jsonl").read_text().splitlines()[0])["header"]
        assert header["task_kwargs"] == {"fold": seed % 5}
    assert {json.dumps(result["env_kwargs"]) for result in results} == {'{"task_kwargs": {"fold": "by_seed"}}'}
    assert all(str(folder) not in file.read_text() for file in tmp_path.glob("run-*/*.json*"))
    held = [task_of("duel/Pool-v0", {"task_kwargs": {"fold": "by_seed"}}, seed).heldout_ids for seed in (1, 6)]
    np.testing.assert_array_equal(*held)


def test_the_environment_is_registered_and_an_agent_learns(folder, tmp_path):
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("duel/Pool-v0", task_kwargs={"folder": str(folder)})
    check_env(env.unwrapped, skip_render_check=True)
    told = RunConfig(
        agent="online_dpo", env="duel/Pool-v0", folder=str(tmp_path / "run"), budget=300, batch=10,
        env_kwargs={"task_kwargs": {"folder": str(folder)}},
        overrides={"policy.learning_rate": 1e-2, "policy.passes": 2},
    )  # fmt: skip
    result = run(told, say=lambda _: None)
    assert result["feedback"] == "threshold"
    assert result["online_win_rate"] > 0.6  # on the training prompts, which come again and again


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random BERT."""
    path = tmp_path_factory.mktemp("encoder")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "answer", "to", *map(str, range(40))])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        BertModel(config).save_pretrained(path)
    return str(path)


def test_embeddings_do_not_depend_on_the_batch(encoder):
    embed = encode(encoder, max_tokens=8)
    texts = ["answer 1 to 2", "answer", "to 3", "", " ".join(["answer"] * 50), "answer " * 8]
    together = embed(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(together, np.concatenate([embed([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(together[4], together[5], atol=1e-5)  # cut at 8 tokens
    assert abs(together[0] - together[2]).max() > 1e-2


@pytest.mark.parametrize("logits", [float("nan"), float("inf"), 1e300, -1e300])
@pytest.mark.parametrize("scale", ["utility", "rank"])
def test_a_unit_of_too_many_logits_is_refused(logits, scale):
    with pytest.raises(ValueError, match=r"logits: expected a finite number|row 1: scores, number 2.*1e\+30 logits"):
        read_rows([row(0, 2) | {"scores": [0, 1e29]}], Columns(scale=scale, logits=logits), "x")


def test_a_list_that_is_not_there_is_named():
    nested = Columns(responses="answers[].text", scores="answers[].score")
    with pytest.raises(MalformedRow, match="data, row 1: answers: expected a list, got None"):
        read_rows([{"prompt": "a", "answers": None}], nested, "data")
    rows, left = read_rows([{"prompt": "a", "responses": ["b", "b"], "scores": [0, 1]}], Columns(), "data")
    with pytest.raises(ValueError, match="expected prompts with two different responses or more, got none"):
        cut(rows, None, left)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
def test_a_pool_with_any_mark_that_ends_a_line_somewhere_is_read_back(mark, tmp_path):
    rows = [{"prompt": f"a{mark}b {n}", "responses": [f"x{mark}y", f"z{n}{mark}"], "scores": [0, 1]} for n in range(4)]
    vectors = embeddings(tmp_path / "e.npz", 4, count=2)
    build_pool(write(tmp_path / "d.jsonl", rows), tmp_path / "pool", Columns(), embeddings=vectors, say=lambda _: None)
    pool = read_pool(tmp_path / "pool")
    assert pool.prompts == tuple(row["prompt"] for row in rows)
    assert pool.responses.tolist() == [row["responses"] for row in rows]


def test_data_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row(n)) + "\n" for n in range(200)))
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], bytes(broken), b"no gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(MalformedRow, match=r"d\.jsonl\.gz.*(damaged after row \d+|not JSON|expected UTF-8)"):
            build_pool(str(path), tmp_path / "pool", Columns(), encoder="none", say=lambda _: None)
    assert not (tmp_path / "pool").exists()


def test_parquet_makes_the_same_pool_and_a_damaged_one_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, vectors = [row(n) for n in range(6)], embeddings(tmp_path / "e.npz", 6)
    parquet = tmp_path / "d.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    for source, out in ((write(tmp_path / "d.jsonl", rows), "lines"), (str(parquet), "parquet")):
        build_pool(source, tmp_path / out, Columns(), embeddings=vectors, say=lambda _: None)
    lines, read = (read_pool(tmp_path / out) for out in ("lines", "parquet"))
    assert read.prompts == lines.prompts
    assert read.responses.tolist() == lines.responses.tolist()
    assert np.array_equal(read.utilities, lines.utilities)
    whole = bytearray(parquet.read_bytes())
    whole[8 : len(whole) // 2] = bytes(len(whole) // 2 - 8)  # zeros where the pages begin; the list at the end is whole
    for damaged in (b"", b"no parquet at all", parquet.read_bytes()[:-20], bytes(whole)):
        parquet.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"d\.parquet: no parquet file, or a damaged one: "):
            build_pool(str(parquet), tmp_path / "pool", Columns(), embeddings=vectors, say=lambda _: None)
    assert not (tmp_path / "pool").exists()


def test_a_build_that_is_killed_leaves_no_pool_of_mixed_files(encoder, tmp_path, monkeypatch):
    """At every step of replacing a pool by another one: what is left is no pool, and nothing of it is used again."""
    out, texts = (
        tmp_path / "pool",
        [write(tmp_path / f"{n}.jsonl", [row(n + 10 * m) for m in range(3)]) for n in (1, 2)],
    )
    build_pool(texts[0], out, Columns(), encoder=encoder, say=lambda _: None)
    first = read_pool(out)
    replace = Path.replace
    for step in range(3):
        steps = iter(range(9))

        def killed(path, target, steps=steps, step=step):
            if next(steps) == step:
                raise KeyboardInterrupt
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            build_pool(texts[1], out, Columns(), encoder=encoder, say=lambda _: None)
        monkeypatch.undo()
        with pytest.raises(ValueError, match="expected a pool"):
            read_pool(out)
        said = []
        build_pool(texts[0], out, Columns(), encoder=encoder, say=said.append)
        assert not any("whose texts are the same" in line for line in said)
        np.testing.assert_array_equal(read_pool(out).response_embeddings, first.response_embeddings)
    assert sorted(path.name for path in out.iterdir()) == ["embeddings.safetensors", "pool.json", "pool.jsonl"]


def test_files_of_others_in_the_folder_are_left_alone(folder, tmp_path):
    (folder / "new").mkdir()
    (folder / "new" / "notes").write_text("mine")
    rows, vectors = [row(n) for n in range(3)], embeddings(tmp_path / "few.npz", 3)
    build_pool(write(tmp_path / "d.jsonl", rows), folder, Columns(), embeddings=vectors, say=lambda _: None)
    assert len(read_pool(folder).prompts) == 3
    assert (folder / "new" / "notes").read_text() == "mine"


@pytest.mark.parametrize("told", [b"", b'{"version": 1, ', b"\xff\xfe", b"[]", b'{"version": 1}'])
def test_a_pool_json_that_is_broken_is_named_and_built_again(told, encoder, tmp_path):
    source, out = write(tmp_path / "d.jsonl", [row(n) for n in range(3)]), tmp_path / "pool"
    build_pool(source, out, Columns(), encoder=encoder, say=lambda _: None)
    (out / "pool.json").write_bytes(told)
    with pytest.raises(ValueError, match=r"pool(\.json|: its files).*build the pool again"):
        read_pool(out)
    build_pool(source, out, Columns(), encoder=encoder, say=lambda _: None)
    assert len(read_pool(out).prompts) == 3


def test_a_line_that_is_broken_is_named(folder):
    path, facts = folder / "pool.jsonl", json.loads((folder / "pool.json").read_text())
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(MalformedRow, match=r"pool\.jsonl, row 13: not JSON"):
        read_pool(folder)
    lines = text.split("\n")
    few = json.dumps({"prompt": "p", "responses": ["a"], "utilities": [0.0]})
    for changed, told in (
        ([lines[0], "{}", *lines[2:]], "row 2: expected prompt, and 6 responses and utilities"),
        ([*lines[:4], few, *lines[5:]], "row 5: expected prompt, and 6 responses and utilities"),
        (lines[1:], "expected 25 prompts, as many as have embeddings, got 24"),
    ):
        path.write_text("\n".join(changed), encoding="utf-8")
        facts["digest"] = digest(path, folder / "embeddings.safetensors")
        (folder / "pool.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=rf"pool\.jsonl.*{told}"):
            read_pool(folder)


def test_an_encoder_embeds_once_for_the_same_texts(encoder, tmp_path):
    source = write(tmp_path / "d.jsonl", [row(n) for n in range(8)])
    said = []
    build_pool(source, tmp_path / "pool", Columns(), encoder=encoder, say=said.append)
    first = read_pool(tmp_path / "pool")
    assert any("embedded 8 of 8" in line for line in said)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(Path(source).read_text(encoding="utf-8"))
    said.clear()
    build_pool(str(tmp_path / "d.jsonl.gz"), tmp_path / "pool", Columns(logits=2.0), encoder=encoder, say=said.append)
    assert any("whose texts are the same" in line for line in said)
    again = read_pool(tmp_path / "pool")
    np.testing.assert_array_equal(first.response_embeddings, again.response_embeddings)
    np.testing.assert_array_equal(2 * first.utilities, again.utilities)


def test_wrong_embeddings_are_refused_before_anything_is_written(tmp_path):
    source, out = write(tmp_path / "d.jsonl", [row(n) for n in range(4)]), tmp_path / "pool"
    for path, told in (
        (embeddings(tmp_path / "few.npz", 3), "expected at least"),
        (embeddings(tmp_path / "narrow.npz", 4, count=K - 1), "expected at least"),
    ):
        with pytest.raises(ValueError, match=told):
            build_pool(source, out, Columns(), embeddings=path, say=lambda _: None)
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match="expected arrays prompt and response"):
        build_pool(source, out, Columns(), embeddings=tmp_path / "other.npz", say=lambda _: None)
    np.save(tmp_path / "one.npy", np.zeros(2))
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("missing.npz", "text.npz", "one.npy"):
        with pytest.raises(ValueError, match=rf"{name}: expected a \.npz file"):
            build_pool(source, out, Columns(), embeddings=tmp_path / name, say=lambda _: None)
    good = {"prompt": np.zeros((6, 5)), "response": np.zeros((6, K, 5))}
    for changed, told in (
        ({"prompt": np.full((6, 5), "x")}, r"kinds\.npz, prompt: expected real numbers, got <U1"),
        ({"response": good["response"] * 1j}, r"kinds\.npz, response: expected real numbers, got complex128"),
        ({"prompt": np.array([None] * 6)}, r"kinds\.npz: damaged, or no arrays of numbers"),
        ({"response": good["response"] + 1e6}, r"half precision holds \(to 65504\), got 1e\+06"),
    ):
        np.savez(tmp_path / "kinds.npz", **(good | changed))
        with pytest.raises(ValueError, match=told):
            build_pool(source, out, Columns(), embeddings=tmp_path / "kinds.npz", say=lambda _: None)
    np.savez(tmp_path / "kinds.npz", **good)
    damaged = bytearray((tmp_path / "kinds.npz").read_bytes())
    damaged[damaged.rindex(b"PK\x01\x02") + 10] = 77  # a compression that there is not
    (tmp_path / "kinds.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"kinds\.npz: damaged"):
        build_pool(source, out, Columns(), embeddings=tmp_path / "kinds.npz", say=lambda _: None)
    for both in ({}, {"encoder": "x", "embeddings": tmp_path / "few.npz"}):
        with pytest.raises(ValueError, match="expected one of encoder and embeddings"):
            build_pool(source, out, Columns(), **both)
    assert not out.exists()


def test_the_command_builds_a_pool_and_says_how_to_play_it(tmp_path, capsys):
    rows = [{"q": row(n)["prompt"], "a": [{"text": t, "p": 0.1 * k} for k, t in enumerate(row(n)["responses"])]}
            for n in range(6)]  # fmt: skip
    source, vectors = write(tmp_path / "d.jsonl", rows), embeddings(tmp_path / "e.npz", 6)
    words = ["pool", "build", source, "--out", str(tmp_path / "pool"), "--embeddings", str(vectors), "--prompt", "q"]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--responses", "a[].text", "--scores", "a[].p", "--scale", "probability"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "6 prompts with 6 responses each; left out: nothing" in told
    assert "--env duel/Pool-v0 --env-set task_kwargs.folder=" in told
    assert read_pool(tmp_path / "pool").utilities[0, 1] == pytest.approx(logit(0.1))
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "row 1: no column 'responses'; it has ['a', 'q']" in capsys.readouterr().err


REAL = os.environ.get("LLM_DUEL_POOL_DATA")


@pytest.mark.skipif(REAL is None, reason="LLM_DUEL_POOL_DATA names no folder with a real pool")
def test_facts_of_a_real_pool(tmp_path):
    """605 prompts of AlpacaEval with the responses of 48 models; figures known from elsewhere."""
    source, vectors = Path(REAL, "alpaca_pool.jsonl.gz"), Path(REAL, "alpaca_pool_minilm.npz")
    told = build_pool(str(source), tmp_path / "pool", PRESETS["alpaca_eval"], embeddings=vectors, say=lambda _: None)
    assert told["ties"] == pytest.approx(0.39, abs=0.01)
    pool = read_pool(tmp_path / "pool")
    lengths = np.array([[len(text) for text in texts] for texts in pool.responses])
    alike = [np.corrcoef(one, other)[0, 1] for one, other in zip(lengths, pool.utilities)]
    assert np.mean(alike) == pytest.approx(0.44, abs=0.02)
