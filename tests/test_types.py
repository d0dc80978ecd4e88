import numpy as np
import pytest

from llm_duel_env.types import Candidates, Duels, Preferences, join, rows_of


def text(prompts, responses, tokens=None, **fields):
    observation = {"prompt": tuple(prompts), "prompt_id": np.arange(len(prompts))}
    return Candidates(observation, np.array(responses, dtype=object), tokens, **fields)


@pytest.fixture
def candidates():
    tokens = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    return text(["p", "q"], [["a", "b", "c"], ["d", "e", "f"]], tokens, lengths=np.full((2, 3), 4))


def test_take_picks_per_prompt(candidates):
    pair = candidates.take(np.array([[2, 0], [1, 1]]))
    assert pair.responses.tolist() == [["c", "a"], ["e", "e"]]
    np.testing.assert_array_equal(pair.tokens[0, 0], candidates.tokens[0, 2])


def test_rows_keep_prompts_and_responses_together(candidates):
    row = candidates.rows(np.array([False, True]))
    assert row.observation["prompt"] == ("q",)
    assert row.responses.tolist() == [["d", "e", "f"]]
    assert row.tokens.shape == (1, 3, 4)


def test_rows_of_and_join_are_inverse(candidates):
    whole = candidates.observation
    again = join([rows_of(whole, np.array([0])), rows_of(whole, np.array([1]))])
    assert again["prompt"] == whole["prompt"]
    np.testing.assert_array_equal(again["prompt_id"], whole["prompt_id"])


def test_stack_and_beside_pad_tokens(candidates):
    short = text(["r", "s"], [["x", "y", "z"], ["u", "v", "w"]], np.ones((2, 3, 2), int), lengths=np.full((2, 3), 2))
    assert Candidates.stack([candidates, short]).tokens.shape == (4, 3, 4)
    wide = Candidates.beside(candidates, short)
    assert wide.shape == (2, 6)
    assert wide.observation["prompt"] == ("p", "q")
    np.testing.assert_array_equal(wide.tokens[0, 3], [1, 1, 0, 0])


def test_stack_keeps_reference_tags():
    plain = text(["p"], [["a", "b"]])
    tagged = text(["q"], [["c", "d"]], from_reference=np.array([[True, False]]))
    np.testing.assert_array_equal(Candidates.stack([plain, tagged]).from_reference, [[False, False], [True, False]])


def test_references_of_two_versions_do_not_mix():
    old = text(["p"], [["a", "b"]], reference_log_prob=np.zeros((1, 2)))
    new = text(["p"], [["a", "b"]], reference_log_prob=np.zeros((1, 2)), reference_version=1)
    with pytest.raises(ValueError, match="different references"):
        Candidates.stack([old, new])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"expected shape \(1, N\)"):
        text(["p"], [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"lengths: expected leading shape \(1, 2\), got \(1, 3\)"):
        text(["p"], [["a", "b"]], lengths=np.ones((1, 3)))
    with pytest.raises(ValueError, match="between 2 responses, got 3"):
        Duels(text(["p"], [["a", "b", "c"]]))


def test_judged_joins_oracle_and_synthetic_labels(candidates):
    duels = candidates.duel(np.array([0, 1]), np.array([1, 2]))
    duels = Duels(duels.pair, np.array([True, False]), np.array([np.nan, 0.0], np.float32))
    judged = duels.judged(np.array([1.0, np.nan]))
    assert judged.first_wins.tolist() == [1.0, 0.0]
    assert judged.from_oracle.tolist() == [True, False]
    assert judged.ordered().responses.tolist() == [["a", "b"], ["f", "e"]]


def test_decided_leaves_out_ties_and_missing_labels():
    pair = text("pqr", [["a", "b"]] * 3)
    preferences = Preferences(pair, np.array([0.5, np.nan, 0.0], np.float32), np.array([True, False, True]))
    assert len(preferences.decided()) == 1
    with pytest.raises(ValueError, match="must have a winner"):
        preferences.ordered()


def test_action_is_what_the_environment_takes(candidates):
    action = candidates.duel(np.array([0, 0]), np.array([1, 2])).action()
    assert action["first"] == ("a", "d")
    assert action["second"] == ("b", "f")
    assert action["query"].tolist() == [1, 1]
