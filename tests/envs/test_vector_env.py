import json

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from llm_duel_env.envs.core import BudgetExceeded
from llm_duel_env.envs.vector_env import DuelVectorEnv
from llm_duel_env.ledger import Ledger, LedgerError, LedgerMismatch
from llm_duel_env.oracles.base import OracleError


def play(env, rounds, seed=None, act=None):
    """Steps with actions that depend on prompts alone; returns (prompt ids, preferences) of the rounds."""
    if seed is not None:
        env.reset(seed=seed)
    history = []
    for _ in range(rounds):
        ids = env.observe()["prompt_id"]
        _, _, _, _, info = env.step(act(ids) if act else {"first": ids % 5, "second": (ids * 2 + 1) % 5})
        history.append((ids.tolist(), info["preference"].tolist()))
    return history


def test_m_duels_are_judged_in_one_call_and_the_next_prompts_come_back(finite_task, counting_oracle):
    task = finite_task(oracle=counting_oracle(), no_reference=True)
    env = DuelVectorEnv(3, task=task)
    now, info = env.reset(seed=0)
    assert info["query_count"].tolist() == [0, 0, 0]
    action = {"first": np.array([0, 1, 2]), "second": np.array([3, 3, 3])}
    after, reward, terminated, truncated, info = env.step(action)
    assert task.oracle.calls == 1
    assert task.oracle.asked == [(int(p), i, 3) for p, i in zip(now["prompt_id"], range(3))]
    assert not set(now["prompt_id"]) & set(after["prompt_id"])
    assert now in env.observation_space
    assert after in env.observation_space
    assert info["query_count"].tolist() == [3, 3, 3]
    assert reward.tolist() == info["preference"].tolist() == [1, 1, 1]  # without a reference: what was observed
    assert not terminated.any()
    assert not truncated.any()
    assert all(value.shape == (3,) for value in info.values())


def test_the_reward_is_the_probability_of_beating_the_reference(finite_task):
    task = finite_task()
    env = DuelVectorEnv(2, task=task)
    now, _ = env.reset(seed=0)
    first, second = np.array([1, 0]), np.array([2, 3])
    _, reward, _, _, info = env.step({"first": first, "second": second})
    u = task.utilities[now["prompt_id"]]
    win = 1 / (1 + np.exp(u[:, [0]] - u))
    rows = np.arange(2)
    assert reward == pytest.approx((win[rows, first] + win[rows, second]) / 2)
    assert info["metrics/online_win_probability"] == pytest.approx(reward)
    assert info["preference"].tolist() == (u[rows, first] > u[rows, second]).astype(float).tolist()


def test_abstaining_shows_nothing_and_costs_nothing(finite_task, counting_oracle):
    task = finite_task(oracle=counting_oracle())
    env = DuelVectorEnv(2, task=task)
    env.reset(seed=0)
    action = {"first": np.array([1, 2]), "second": np.array([3, 4]), "query": np.array([0, 1])}
    before = env.observe()["prompt_id"]
    _, reward, _, _, info = env.step(action)
    assert np.isnan(info["preference"]).tolist() == [True, False]
    assert info["charged"].tolist() == [False, True]
    assert reward[0] == 0
    assert env.query_count == 1
    assert all(np.isnan(value[0]) for name, value in info.items() if name.startswith("metrics/"))
    assert {prompt for prompt, _, _ in task.oracle.asked} == {before[1]}
    assert not set(before) & set(env.observe()["prompt_id"])


def test_an_identical_pair_is_a_shown_tie_that_is_neither_sent_nor_charged(finite_task, counting_oracle):
    silent = finite_task(oracle=counting_oracle(), no_reference=True)
    env = DuelVectorEnv(2, task=silent, budget=1)
    env.reset(seed=0)
    _, reward, _, truncated, info = env.step({"first": np.array([1, 2]), "second": np.array([1, 2])})
    assert silent.oracle.calls == 0
    assert info["preference"].tolist() == reward.tolist() == [0.5, 0.5]
    assert info["tie"].all()
    assert not info["charged"].any()
    assert not truncated.any()
    task = finite_task()
    env = DuelVectorEnv(1, task=task)
    now, _ = env.reset(seed=0)
    info = env.step({"first": np.array([2]), "second": np.array([2])})[4]
    u = task.utilities[now["prompt_id"][0]]
    assert info["metrics/online_win_rate"][0] == float(u[2] > u[0])
    assert info["metrics/utility_regret"][0] == pytest.approx(u.max() - u[2])


def test_the_budget_is_never_exceeded(finite_task, tmp_path):
    env = DuelVectorEnv(2, task=finite_task(), budget=3, ledger=tmp_path / "l")
    env.reset(seed=0)
    action = {"first": np.array([0, 1]), "second": np.array([2, 3])}
    assert not env.step(action)[3].any()
    state, size = env.state_dict(), (tmp_path / "l").stat().st_size
    with pytest.raises(BudgetExceeded, match=r"at most 1 queries.* got 2"):
        env.step(action)
    assert env.state_dict() == state
    assert (tmp_path / "l").stat().st_size == size
    assert env.step({**action, "query": np.array([0, 1])})[3].all()
    assert (env.query_count, env.remaining, env.budget) == (3, 0, 3)
    env.close()


def test_rounds_are_limited(finite_task):
    env = DuelVectorEnv(1, task=finite_task(), max_rounds=2)
    env.reset(seed=0)
    action = {"first": np.array([0]), "second": np.array([1])}
    assert [bool(env.step(action)[3][0]) for _ in range(2)] == [False, True]
    with pytest.raises(ResetNeeded):
        env.step(action)
    assert env.remaining is None
    env.reset()
    assert env.round == 0


def test_nothing_works_before_reset(finite_task):
    env = DuelVectorEnv(1, task=finite_task())
    with pytest.raises(ResetNeeded):
        env.observe()
    with pytest.raises(ResetNeeded):
        env.step({"first": np.array([0]), "second": np.array([1])})


def test_prompts_and_noise_depend_on_the_seed_and_not_on_the_batch(finite_task):
    task = finite_task(feedback="bernoulli")
    # 42 duels are six epochs of seven prompts.
    flat = [
        [
            pair
            for ids, labels in play(DuelVectorEnv(m, task=task, flip_rate=0.2), 42 // m, seed)
            for pair in zip(ids, labels)
        ]
        for m, seed in ((1, 3), (6, 3), (14, 3), (6, 4))
    ]
    assert str(flat[0]) == str(flat[1]) == str(flat[2]) != str(flat[3])
    ids = np.array([prompt for prompt, _ in flat[0]]).reshape(6, 7)
    assert (np.sort(ids) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in ids}) > 1


def test_reset_without_a_seed_is_a_new_run_and_a_seed_starts_again(finite_task):
    env = DuelVectorEnv(5, task=finite_task(train_prompts=100))
    runs = [env.reset(seed=s)[0]["prompt_id"].tolist() for s in (1, None, None, 1, None)]
    assert runs[0] == runs[3]
    assert runs[1] == runs[4]
    assert len({tuple(run) for run in runs}) == 3
    with pytest.raises(TypeError, match="one whole number"):
        env.reset(seed=[1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False, True, True, True])})


@pytest.mark.parametrize("bad", [[np.nan, 0.5], [np.inf, 0.5], [1.5, 0.5], [-0.1, 0.5], [0.5]])
@pytest.mark.parametrize("no_reference", [True, False])
def test_an_unusable_oracle_stops_before_anything_is_recorded(
    finite_task, counting_oracle, tmp_path, bad, no_reference
):
    task = finite_task(oracle=counting_oracle(lambda m: np.array(bad)), no_reference=no_reference)
    env = DuelVectorEnv(2, task=task, ledger=tmp_path / "l")
    env.reset(seed=0)
    state, size = env.state_dict(), (tmp_path / "l").stat().st_size
    with pytest.raises(OracleError, match="CountingOracle"):
        env.step({"first": np.array([1, 2]), "second": np.array([3, 4])})
    assert env.state_dict() == state
    assert (tmp_path / "l").stat().st_size == size
    env.close()


def test_a_run_resumed_from_its_state_and_ledger_repeats_itself_without_buying(finite_task, counting_oracle, tmp_path):
    whole = play(DuelVectorEnv(2, task=finite_task(feedback="bernoulli")), 6, seed=3)
    env = DuelVectorEnv(2, task=finite_task(feedback="bernoulli"), ledger=tmp_path / "l")
    play(env, 2, seed=3)
    state = json.loads(json.dumps(env.state_dict()))
    play(env, 2)
    env.close()
    bought = (tmp_path / "l").read_bytes()
    silent = finite_task(oracle=counting_oracle(), no_reference=True, feedback="bernoulli")
    env = DuelVectorEnv(2, task=silent, ledger=tmp_path / "l")
    env.load_state_dict(state)
    assert str(play(env, 2)) == str(whole[2:4])
    assert silent.oracle.calls == 0
    assert (tmp_path / "l").read_bytes() == bought
    env.close()
    env = DuelVectorEnv(2, task=finite_task(feedback="bernoulli"), ledger=tmp_path / "l")
    assert str(play(env, 6, seed=3)) == str(whole)  # from the start: four rounds replayed, two bought
    assert len(env.ledger) == env.query_count > len(bought.splitlines()) - 1
    env.close()


def test_nothing_is_bought_past_a_closed_ledger(finite_task, tmp_path):
    env = DuelVectorEnv(2, task=finite_task(), ledger=tmp_path / "l")
    play(env, 1, seed=3)
    with pytest.raises(LedgerMismatch):
        env.reset(seed=4)
    with pytest.raises(ResetNeeded, match="closed"):
        play(env, 1)
    env.load_state_dict(env.state_dict())
    play(env, 1)
    env.close()
    with pytest.raises(ResetNeeded, match="closed"):
        play(env, 1)


def test_a_round_that_was_half_written_is_half_replayed(finite_task, counting_oracle, tmp_path):
    env = DuelVectorEnv(3, task=finite_task(), ledger=tmp_path / "l")
    distinct = lambda ids: {"first": np.array([0, 1, 2]), "second": np.array([3, 4, 4])}  # noqa: E731
    whole = play(env, 1, seed=3, act=distinct)
    env.close()
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    (tmp_path / "l").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    task = finite_task(oracle=counting_oracle(lambda m: np.full(m, 0.9)), no_reference=True)
    env = DuelVectorEnv(3, task=task, ledger=tmp_path / "l")
    again = play(env, 1, seed=3, act=distinct)
    assert len(task.oracle.asked) == 1
    assert again[0][1][:2] == whole[0][1][:2]
    assert again[0][1][2] == 1
    env.close()


def test_other_duels_or_another_run_do_not_pass_for_the_recorded(finite_task, tmp_path):
    env = DuelVectorEnv(2, task=finite_task(), ledger=tmp_path / "l")
    play(env, 2, seed=3)
    state = env.state_dict()
    with pytest.raises(LedgerMismatch, match="seed was 3, now 4"):
        env.reset(seed=4)
    env.reset(seed=3)
    before = env.state_dict()
    with pytest.raises(LedgerMismatch, match="query 0 was about"):
        play(env, 1, act=lambda ids: {"first": (ids + 1) % 5, "second": (ids + 3) % 5})
    assert env.state_dict() == before
    with pytest.raises(LedgerError, match="another run"):
        DuelVectorEnv(2, task=finite_task(), ledger=tmp_path / "l").reset(seed=3)
    env.close()
    with pytest.raises(LedgerMismatch, match=r"flip_rate was 0.0, now 0.1"):
        DuelVectorEnv(2, task=finite_task(), ledger=tmp_path / "l", flip_rate=0.1).reset(seed=3)
    (tmp_path / "l").write_bytes(b"".join((tmp_path / "l").read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(LedgerMismatch, match=r"expected at least the .* got 1"):
        DuelVectorEnv(2, task=finite_task(), ledger=tmp_path / "l").load_state_dict(state)


def test_unicode_survives_environment_ledger_and_export(text_task, tmp_path):
    env = DuelVectorEnv(5, task=text_task(), ledger=tmp_path / "l")
    now, _ = env.reset(seed=1)
    first = ("é🙂", "猫\u2028猫", "a\nb", 'q"\\', "\x00zero")
    second = ("länger als é", "b", "犬です", "x", "y")
    info = env.step({"first": first, "second": second})[4]
    env.close()
    with Ledger(tmp_path / "l") as ledger:
        rows = [ledger.record(n) for n in range(5)]
        assert ledger.export_preferences(tmp_path / "pairs.jsonl") == 4  # one pair is of equal length: a tie
    assert [row["prompt"] for row in rows] == list(now["prompt"])
    assert [(row["first"], row["second"]) for row in rows] == list(zip(first, second))
    assert info["tie"].tolist() == [False, False, True, False, False]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_bytes().split(b"\n")[:-1]]
    assert pairs[0] == {"prompt": now["prompt"][0], "chosen": "länger als é", "rejected": "é🙂"}
    assert pairs[1] == {"prompt": now["prompt"][1], "chosen": "猫\u2028猫", "rejected": "b"}


def test_evaluation_spends_nothing(finite_task):
    env = DuelVectorEnv(2, task=finite_task(), budget=5)
    env.reset(seed=0)
    state = env.state_dict()
    scores = env.evaluate(lambda prompts: np.zeros(len(prompts["prompt_id"]), np.int64))
    assert scores["offline_win_rate"] == 0.5
    assert len(env.evaluate_prompts(lambda prompts: [1, 1], prompts=2)["true_utility"]) == 2
    assert env.state_dict() == state


BAD_ARGUMENTS = [{"budget": 0}, {"budget": 1.5}, {"max_rounds": 0}, {"num_envs": 0}, {"render_mode": "human"}]


@pytest.mark.parametrize("bad", [*BAD_ARGUMENTS, {"feedback": "x"}, {"task_kwargs": {"a": 1}}, {"task": "pool"}])
def test_bad_arguments_are_refused(finite_task, bad):
    with pytest.raises(ValueError, match=r"expected|given as an object"):
        DuelVectorEnv(**{"num_envs": 2, "task": finite_task(), **bad})


def test_a_bad_state_is_refused(finite_task):
    env = DuelVectorEnv(1, task=finite_task())
    for state in ({}, {"seed": 1, "served": 0, "round": 0}, {"seed": None, "served": 0, "round": 0, "query_count": 0}):
        with pytest.raises(ValueError, match=r"expected a state|state: seed: expected"):
            env.load_state_dict(state)


def test_vector_wrappers_go_around_it(text_task):
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(DuelVectorEnv(2, task=text_task(), max_rounds=2))
    env = gymnasium.wrappers.vector.DictInfoToList(env)
    env.reset(seed=0)
    action = {"first": ("abc", "a very much longer text"), "second": ("b", "c")}
    rewards = [env.step(action)[1]]
    _, reward, _, truncated, infos = env.step(action)
    assert truncated.all()
    assert [info["episode"]["r"] for info in infos] == pytest.approx(list(rewards[0] + reward))
    assert [info["preference"] for info in infos] == [1, 1]
