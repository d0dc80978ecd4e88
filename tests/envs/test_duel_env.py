import json
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import llm_duel_env  # noqa: F401  (registers the ids)
from llm_duel_env.envs.duel_env import DuelEnv
from llm_duel_env.envs.vector_env import DuelVectorEnv

SMALL = {"candidates": 4, "train_prompts": 20, "heldout_prompts": 5}
IDS = ["duel/Synthetic-v0", "duel/TinyTLDR-v0", "duel/Text-v0"]


@pytest.mark.parametrize("kind", ["finite", "text"])
@pytest.mark.parametrize("no_reference", [False, True])
def test_gymnasiums_checker_is_content(finite_task, text_task, kind, no_reference):
    task = (text_task if kind == "text" else finite_task)(no_reference=no_reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(DuelEnv(task=task))


def test_one_step_says_what_the_batch_of_one_says(text_task):
    single, batch = DuelEnv(task=text_task()), DuelVectorEnv(1, task=text_task())
    now, _ = single.reset(seed=4)
    row, _ = batch.reset(seed=4)
    for query in (1, 0, 1):
        assert now["prompt"] == row["prompt"][0]
        assert now["prompt_id"] == row["prompt_id"][0]
        now, reward, terminated, truncated, info = single.step({"first": "long é", "second": "s", "query": query})
        row, rewards, _, _, infos = batch.step({"first": ["long é"], "second": ["s"], "query": [query]})
        assert reward == rewards[0]
        assert (terminated, truncated) == (False, False)
        for name, value in infos.items():
            assert info.get(name, np.nan) == pytest.approx(value[0], nan_ok=True)
        assert not any(np.isnan(value) for value in info.values())
    assert ("preference" in info, single.query_count) == (True, 2)


def test_wrappers_of_single_environments(finite_task):
    env = gymnasium.wrappers.TimeLimit(DuelEnv(task=finite_task()), 3)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    rewards, done = [], False
    while not done:
        _, reward, terminated, done, info = env.step({"first": 1, "second": 2, "query": 1})
        rewards.append(reward)
        assert not terminated
    assert info["episode"]["l"] == 3
    assert info["episode"]["r"] == pytest.approx(sum(rewards), abs=1e-5)


def test_the_budget_ends_the_episode(finite_task):
    env = DuelEnv(task=finite_task(), budget=1)
    env.reset(seed=0)
    assert env.step({"first": 1, "second": 1, "query": 1})[3] is False
    assert env.step({"first": 1, "second": 2, "query": 1})[3] is True


def test_the_ids_are_registered_with_both_entry_points():
    for name in IDS:
        spec = gymnasium.spec(name)
        assert spec.entry_point.endswith("DuelEnv")
        assert spec.vector_entry_point.endswith("DuelVectorEnv")


def test_make_from_the_module_and_check():
    env = gymnasium.make("llm_duel_env:duel/Synthetic-v0", budget=40, task_kwargs=SMALL)
    check_env(env.unwrapped)
    assert env.unwrapped.budget == 40


def test_a_spec_survives_json(tmp_path):
    kwargs = {"budget": 9, "task_kwargs": SMALL, "feedback": "threshold", "ledger": str(tmp_path / "l")}
    env = gymnasium.make("duel/Synthetic-v0", **kwargs)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.spec == env.spec
    assert (again.unwrapped.budget, again.unwrapped.core.feedback.kind) == (9, "threshold")


def test_make_vec_gives_the_native_batch_and_its_spec_makes_it_again():
    env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=3, budget=9, task_kwargs=SMALL)
    assert isinstance(env, DuelVectorEnv)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    again = gymnasium.make_vec(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    env.action_space.seed(0)
    again.action_space.seed(0)
    for made in (env, again):
        made.reset(seed=5)
    for _ in range(3):
        steps = [made.step(made.action_space.sample()) for made in (env, again)]
        np.testing.assert_equal(steps[0], steps[1])
    assert steps[0][0] in env.observation_space
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    assert wrapped.reset(seed=5)[0]["prompt_id"].shape == (3,)


def test_gymnasiums_own_batch_makes_separate_runs():
    env = gymnasium.make_vec("duel/Synthetic-v0", num_envs=2, vectorization_mode="sync", task_kwargs=SMALL)
    env.reset(seed=[1, 2])
    now, reward, _, _, info = env.step(env.action_space.sample())
    assert now in env.observation_space
    assert reward.shape == (2,)
    assert info["query_count"].shape == (2,)


def test_text_in_gymnasiums_own_batch(text_task):
    env = gymnasium.vector.SyncVectorEnv([lambda: DuelEnv(task=text_task())] * 2)
    now, _ = env.reset(seed=0)
    assert now in env.observation_space
    after = env.step({"first": ("ä", "b"), "second": ("🙂🙂", "d"), "query": np.ones(2, np.int64)})
    assert after[4]["preference"].tolist() == [0, 0.5]


def test_an_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match=r"\['pool', 'synthetic', 'text', 'tiny_tldr'\], got 'puddle'"):
        gymnasium.make("duel/Synthetic-v0", task="puddle")


@pytest.fixture
def tiny_models(tmp_path):
    """Folders of a random reward model with a word-level tokenizer, and of a policy that nothing here loads."""
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "say": 2, "yes": 3, "no": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=5, num_labels=1, pad_token_id=0, **shape))
    model.save_pretrained(tmp_path / "judge")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        tmp_path / "judge"
    )
    (tmp_path / "policy").mkdir()
    rows = [json.dumps({"prompt": f"say {n}", "reference": "yes" if n % 2 else "no"}) for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_gymnasiums_checker_is_content_with_the_text_ids(tiny_models):
    text = {"model": str(tiny_models / "policy"), "oracle": f"reward_model:{tiny_models / 'judge'}"}
    text |= {"prompts": str(tiny_models / "prompts.jsonl"), "heldout": 2}
    for name, told in (("duel/TinyTLDR-v0", {}), ("duel/Text-v0", text)):
        env = gymnasium.make(name, task_kwargs=told)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            check_env(env.unwrapped)
        env.close()


def test_scores_are_told_by_both_environments_made_by_id():
    env = gymnasium.make("duel/Synthetic-v0", scores=True, task_kwargs=SMALL)
    batch = gymnasium.make_vec("duel/Synthetic-v0", num_envs=1, scores=True, task_kwargs=SMALL)
    env.reset(seed=1)
    batch.reset(seed=1)
    info = env.step({"first": 0, "second": 1, "query": 1})[-1]
    infos = batch.step({"first": [0], "second": [1], "query": [1]})[-1]
    np.testing.assert_array_equal(info["scores"], infos["scores"][0])
    assert info["evaluations"] == 2
    info = env.step({"first": 0, "second": 1, "query": 0})[-1]
    assert "scores" not in info
    assert info["evaluations"] == 0


def test_a_numpy_seed_is_a_seed(finite_task):
    for env in (DuelEnv(task=finite_task()), DuelVectorEnv(2, task=finite_task())):
        expected, _ = env.reset(seed=3)
        got, _ = env.reset(seed=np.int64(3))
        np.testing.assert_array_equal(got["prompt_id"], expected["prompt_id"])
        with pytest.raises(TypeError, match="seed: expected one whole number"):
            env.reset(seed=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": -1}, "round: expected a whole number of at least 0, got -1"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"query_count": 9}, "query_count: expected at most 8, the budget, got 9"),
        ({"kept": [20]}, "kept: expected a list of training prompt ids below 20"),
        ({"kept": "all"}, "kept: expected a list"),
        ({"more": 1}, "expected a state"),
    ],
)
def test_what_is_no_state_is_refused(change, message):
    env = DuelEnv(task="synthetic", task_kwargs=SMALL, budget=8)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.load_state_dict({**env.state_dict(), **change})
    with pytest.raises(ValueError, match="expected a state, a mapping"):
        env.load_state_dict([1, 2])


@pytest.mark.parametrize("setting", [{"feedback": ""}, {"ledger": ""}])
def test_empty_names_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        DuelEnv(task="synthetic", task_kwargs=SMALL, **setting)
