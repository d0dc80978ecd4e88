from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from llm_duel_env.extras import MissingExtraError
from llm_duel_env.oracles.utility import UtilityOracle
from llm_duel_env.tasks import make_task
from llm_duel_env.tasks.prompt_files import PRESETS, MalformedRow
from llm_duel_env.tasks.text import Text

ORACLE = UtilityOracle(lambda prompts, responses: np.array([len(r) for r in responses], float))

# One row of each data set's schema, with the prompt and the reference that it should give.
SCHEMAS = {
    "tldr": [
        (
            {"prompt": "SUBREDDIT: r/x\n\nPOST: {n}\n\nTL;DR:", "label": " short {n}"},
            "SUBREDDIT: r/x\n\nPOST: {n}\n\nTL;DR:",
            " short {n}",
        ),
        ({"prompt": "POST: {n} TL;DR:", "completion": " brief {n}"}, "POST: {n} TL;DR:", " brief {n}"),
        (
            {"prompt": "POST: {n} TL;DR:", "pythia-1b-reference": "sampled {n}", "label": "human"},
            "POST: {n} TL;DR:",
            "sampled {n}",
        ),
    ],
    "ultrafeedback": [
        (
            {
                "prompt": "Explain {n}.",
                "prompt_id": "ab12",
                "chosen": [{"role": "user", "content": "Explain {n}."}, {"role": "assistant", "content": "It is {n}."}],
                "rejected": [{"role": "user", "content": "Explain {n}."}, {"role": "assistant", "content": "No."}],
                "score_chosen": 8.5,
            },
            "Explain {n}.",
            "It is {n}.",
        )
    ],
    "hh_rlhf": [
        (
            {
                "chosen": "\n\nHuman: Hi {n}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good {n}.",
                "rejected": "\n\nHuman: Hi {n}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Bad.",
            },
            "\n\nHuman: Hi {n}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:",
            "Good {n}.",
        )
    ],
    "shp2": [
        (
            {"history": "Why {n}?", "human_ref_A": "Since {n}.", "human_ref_B": "Dunno.", "labels": 1, "score_A": 9},
            "Why {n}?",
            "Since {n}.",
        ),
        (
            {"history": "Why {n}?", "human_ref_A": "Dunno.", "human_ref_B": "So {n}.", "labels": 0},
            "Why {n}?",
            "So {n}.",
        ),
    ],
}


def fill(value, n):
    return json.loads(json.dumps(value).replace("{n}", str(n)))


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def plain(path, count: int = 20, **extra) -> str:
    return write(path, [{"prompt": f"prompt {n}", "reference": f"reference {n}", **extra} for n in range(count)])


def make(**kwargs) -> Text:
    return Text(**{"model": "some/model", "oracle": ORACLE, "heldout": 5, **kwargs})


@pytest.mark.parametrize(("preset", "case"), [(p, c) for p, cases in SCHEMAS.items() for c in cases])
def test_presets_read_their_schemas(tmp_path, preset, case):
    row, prompt, reference = case
    task = make(preset=preset, prompts=write(tmp_path / "rows.jsonl", [fill(row, n) for n in range(20)]))
    assert (task.train_prompts, task.heldout_prompts) == (15, 5)
    everything = np.arange(20)
    expected = {fill(prompt, n): fill(reference, n) for n in range(20)}
    assert dict(zip(task.observe(everything)["prompt"], task.reference(everything))) == expected


@pytest.mark.parametrize(
    ("preset", "case", "recorded"),
    [
        ("ultrafeedback", 0, ["It is {n}.", "No."]),
        ("hh_rlhf", 0, ["Good {n}.", "Bad."]),
        ("shp2", 0, ["Since {n}.", "Dunno."]),
        ("shp2", 1, ["Dunno.", "So {n}."]),  # in the order of the data, whichever is preferred
        ("tldr", 0, None),
    ],
)
def test_presets_read_recorded_responses(tmp_path, preset, case, recorded):
    row = SCHEMAS[preset][case][0]
    task = make(preset=preset, prompts=write(tmp_path / "rows.jsonl", [fill(row, n) for n in range(20)]))
    view = task.view()
    assert ("offline_pairs" in view.provides) == (view.given is not None) == (recorded is not None)
    if recorded is not None:
        observation = view.observe(np.array([3, 8]))
        n = [int("".join(filter(str.isdigit, prompt.split("Human: Hi")[-1]))) for prompt in observation["prompt"]]
        assert view.given(observation).tolist() == [fill(recorded, number) for number in n]


def test_transcripts_that_differ_before_their_last_turn_record_no_pair(tmp_path):
    row = {"chosen": "\n\nHuman: {n}\n\nAssistant: Good.", "rejected": "\n\nHuman: else {n}\n\nAssistant: Bad."}
    task = make(preset="hh_rlhf", prompts=write(tmp_path / "rows.jsonl", [fill(row, n) for n in range(20)]))
    assert task.view().given is None


def test_recorded_responses_are_cut_to_what_every_prompt_has(tmp_path):
    rows = [{"prompt": f"prompt {n}", "texts": [f"{n} {k}" for k in range(2 + n % 3)]} for n in range(20)]
    task = make(prompts=write(tmp_path / "rows.jsonl", rows), responses_column="texts")
    observation = task.view().observe(np.arange(4))
    given = task.view().given(observation)
    assert given.shape == (4, 2)
    assert [text.split()[0] for text in given[:, 0]] == [prompt.split()[1] for prompt in observation["prompt"]]
    assert all(first.endswith(" 0") and second.endswith(" 1") for first, second in given)
    rows[7]["texts"] = "not a list"
    with pytest.raises(MalformedRow, match="row 8: column 'texts': expected a list of texts, got 'not a list'"):
        make(prompts=write(tmp_path / "rows.jsonl", rows), responses_column="texts")


def test_every_preset_has_a_schema_here():
    assert set(PRESETS) == set(SCHEMAS)


def test_the_split_is_fixed_distinct_and_not_the_tail(tmp_path):
    source = plain(tmp_path / "rows.jsonl", 40)
    one, other = make(prompts=source, heldout=10), make(prompts=source, heldout=10)
    held = one.observe(one.heldout_ids)["prompt"]
    assert held == other.observe(other.heldout_ids)["prompt"]
    assert set(held) != {f"prompt {n}" for n in range(30, 40)}
    assert len({*held, *one.observe(np.arange(30))["prompt"]}) == 40


def test_repeated_prompts_are_read_once(tmp_path):
    rows = [{"prompt": f"prompt {n % 8}", "reference": str(n)} for n in range(40)]
    task = make(prompts=write(tmp_path / "rows.jsonl", rows), heldout=3)
    assert task.train_prompts + task.heldout_prompts == 8
    assert set(task.reference(np.arange(8))) == {str(n) for n in range(8)}  # the first row of each


def test_a_heldout_file_wins_over_the_training_prompts(tmp_path):
    heldout = write(tmp_path / "held.jsonl", [{"prompt": f"prompt {n}", "reference": "r"} for n in (3, 99)])
    task = make(prompts=plain(tmp_path / "rows.jsonl"), heldout=heldout)
    assert task.observe(task.heldout_ids)["prompt"] == ("prompt 3", "prompt 99")
    assert "prompt 3" not in task.observe(np.arange(task.train_prompts))["prompt"]


def test_templates_and_columns(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"q": f"a {{b}} {n}", "a": "answer"} for n in range(9)])
    task = make(prompts=source, prompt_column="q", reference_column="a", template="Q: {prompt}\nA:", heldout=2)
    assert all(p.startswith("Q: a {b} ") and p.endswith("\nA:") for p in task.observe(np.arange(9))["prompt"])


def test_without_references_there_is_none(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": f"p {n}"} for n in range(9)])
    task = make(prompts=source, heldout=2)
    assert task.reference(np.arange(3)) is None


def test_stored_references_override_and_must_cover_the_heldout_prompts(tmp_path):
    source = plain(tmp_path / "rows.jsonl", 9)
    rows = [{"prompt": f"prompt {n}", "reference": f"sampled {n}"} for n in range(9)]
    task = make(prompts=source, heldout=2, references=write(tmp_path / "refs.jsonl", rows))
    observation = task.observe(np.arange(9))
    assert list(task.reference(np.arange(9))) == [p.replace("prompt", "sampled") for p in observation["prompt"]]
    missing = [row for row in rows if row["prompt"] != observation["prompt"][-1]]
    with pytest.raises(ValueError, match="no reference for held-out prompt 1"):
        make(prompts=source, heldout=2, references=write(tmp_path / "few.jsonl", missing))


@pytest.mark.parametrize(
    ("preset", "row", "message"),
    [
        ("tldr", {"text": "x"}, "row 3: no column 'prompt'"),
        ("tldr", {"prompt": 5}, "row 3: column 'prompt': expected a text, got int"),
        ("tldr", {"prompt": "  "}, "row 3: expected a prompt that is not empty"),
        ("ultrafeedback", {"prompt": "x", "chosen": [{"role": "user"}]}, "row 3: column 'chosen': expected a text or"),
        ("hh_rlhf", {"chosen": "just text"}, "row 3: column 'chosen': expected turns"),
        ("shp2", {"history": "x", "human_ref_A": "a", "labels": 2}, "row 3: column 'labels': expected 0 or 1, got 2"),
    ],
)
def test_malformed_rows_are_named(tmp_path, preset, row, message):
    good = [fill(SCHEMAS[preset][0][0], n) for n in range(2)]
    with pytest.raises(MalformedRow, match=message):
        make(preset=preset, prompts=write(tmp_path / "rows.jsonl", [*good, row]), heldout=1)


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    for broken in ('{"prompt": ', '{"n": ' + "9" * 5000 + "}", "[" * 200_000):
        path.write_text('{"prompt": "a"}\n' + broken + "\n")
        with pytest.raises(MalformedRow, match="row 2: not JSON"):
            make(prompts=str(path), heldout=1)
    path.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(MalformedRow, match="row 2: expected a JSON object, got list"):
        make(prompts=str(path), heldout=1)


def test_mistakes_are_refused(tmp_path):
    source = plain(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="preset: expected one of"):
        make(preset="reddit")
    with pytest.raises(ValueError, match="got neither"):
        make()
    with pytest.raises(ValueError, match="expected 1 to 19 of the 20"):
        make(prompts=source, heldout=20)
    with pytest.raises(ValueError, match="reward_model:FOLDER"):
        make(prompts=source, oracle="length")
    with pytest.raises(ValueError, match="oracle_kwargs"):
        make(prompts=source, oracle_kwargs={"scale": 2.0})
    with pytest.raises(ValueError, match=r"template: expected \{prompt\}"):
        make(prompts=source, template="Q:")
    with pytest.raises(FileNotFoundError, match="no such file"):
        make(prompts=str(tmp_path / "absent.jsonl"))


def test_a_hub_data_set_is_loaded_by_name_and_split(monkeypatch):
    calls = []
    hub = ModuleType("datasets")
    hub.load_dataset = lambda name, split: (
        calls.append((name, split)) or [fill(SCHEMAS["tldr"][1][0], n) for n in range(9)]
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert make(preset="tldr").train_prompts == 4
    make(prompts="someone/prompts", split="test")
    assert calls == [("trl-lib/tldr", "train"), ("someone/prompts", "test")]


def test_a_hub_data_set_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llm-duel-env\[hub\]'"):
        make(preset="tldr")


def test_made_by_name_with_spaces_and_a_view(tmp_path):
    task = make_task("text", model="m", oracle=ORACLE, prompts=plain(tmp_path / "rows.jsonl"), heldout=5)
    view = task.view()
    assert (view.model, view.max_new_tokens, view.max_prompt_tokens) == ("m", 64, 512)
    observation = view.observe(np.array([0, 14]))
    assert all(text in task.observation_space["prompt"] for text in observation["prompt"])
    assert "" in task.response_space
    with pytest.raises(ValueError, match="training prompt ids"):
        view.observe(np.array([15]))
    assert not any(isinstance(value, UtilityOracle) for value in vars(view).values())


@pytest.mark.parametrize("setting", [{"template": "Q: {prompt}"}, {"prompt_column": "q"}, {"reference_column": None}])
def test_a_preset_says_what_contradicts_it(tmp_path, setting):
    with pytest.raises(ValueError, match=f"preset 'tldr' fixes how rows are read: expected no {next(iter(setting))}"):
        make(preset="tldr", prompts=plain(tmp_path / "rows.jsonl"), **setting)


def test_files_of_other_bytes_are_read_or_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = b"".join(b'{"prompt": "p %d"}\n' % n for n in range(3))
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert make(prompts=str(path), heldout=1).train_prompts == 2
    path.write_bytes(good + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(MalformedRow, match=r"rows.jsonl, row 4: expected UTF-8"):
        make(prompts=str(path), heldout=1)
    path.write_bytes(good + b'{"prompt": "x \\ud800"}\n')
    with pytest.raises(MalformedRow, match=r"rows.jsonl, row 4: expected text without lone surrogates"):
        make(prompts=str(path), heldout=1)


@pytest.mark.parametrize(
    "setting", [{"limit": 0}, {"max_new_tokens": 0}, {"max_prompt_tokens": -1}, {"heldout": True}, {"limit": 2.5}]
)
def test_sizes_out_of_range_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected a whole number of at least 1"):
        make(prompts=plain(tmp_path / "rows.jsonl"), **setting)


def test_the_oracle_is_loaded_after_all_that_is_cheap(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_duel_env.tasks.text.make_oracle", lambda *_: pytest.fail("the oracle was loaded"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        make(oracle="reward_model:some/model", prompts=str(tmp_path / "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match="model: expected a model's folder or a hub name"):
        make(oracle="reward_model:some/model", model=str(tmp_path / "no"), prompts=plain(tmp_path / "rows.jsonl"))


def test_heldout_prompts_of_the_hub_have_their_own_split(monkeypatch):
    calls = []
    hub = ModuleType("datasets")
    hub.load_dataset = lambda name, split: calls.append(split) or [{"prompt": f"{split} {n}"} for n in range(5)]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    task = make(prompts="someone/prompts", heldout="someone/prompts", heldout_split="test")
    assert (calls, task.train_prompts, task.heldout_prompts) == (["train", "test"], 5, 5)
    with pytest.raises(ValueError, match="heldout_split goes with a data set"):
        make(prompts="someone/prompts", heldout=2, heldout_split="test")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(6)))
    return str(path)


def test_the_fingerprint_is_of_the_files_of_a_models_folder(tmp_path, prompts):
    def taken(folder):
        return Text(str(tmp_path / folder), ORACLE, prompts=prompts, heldout=2).fingerprint()

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
    before = taken("a")
    assert taken("a") == before == taken("b")  # of what is in it, not of its name
    (tmp_path / "b" / "model.safetensors").write_bytes(b"trained")  # as many bytes
    trained = taken("b")
    (tmp_path / "a" / "config.json").write_text('{"x": 1}')
    assert len({before, trained, taken("a")}) == 3


def test_the_fingerprint_knows_the_commit_of_a_hub_model(tmp_path, prompts, monkeypatch):
    from transformers import AutoConfig

    from llm_duel_env import pretrained

    def fingerprint(commit):
        def resolve(name, **kwargs):
            assert name == "owner/model"
            if commit is None:
                raise OSError("no network")
            return SimpleNamespace(_commit_hash=commit)

        pretrained.hub_commit.cache_clear()
        monkeypatch.setattr(AutoConfig, "from_pretrained", resolve)
        return Text("owner/model", ORACLE, prompts=prompts, heldout=2).fingerprint()

    assert fingerprint("a" * 40) == fingerprint("a" * 40)
    assert len({fingerprint("a" * 40), fingerprint("b" * 40), fingerprint(None)}) == 3
    pretrained.hub_commit.cache_clear()
