import pytest

from llm_duel_env.agents.policies.base import PolicyConfig, learning_rate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("passes", 0), ("batch", 0), ("microbatch", 0), ("learning_rate", 0.0), ("grad_clip", -1.0)),
        *(("temperature", 0.0), ("temperature", float("nan")), ("warmup", 1.0), ("warmup", -0.1)),
    ],
)
def test_settings_that_could_only_fail_in_a_round_are_refused_before_one(name, value):
    with pytest.raises(ValueError, match=f"policy.{name}: expected"):
        PolicyConfig(**{name: value})


def test_the_learning_rate_rises_then_follows_a_cosine():
    config = PolicyConfig(learning_rate=2.0, warmup=0.2, final_learning_rate=0.1)
    rates = [learning_rate(config, progress) for progress in (0.0, 0.1, 0.2, 0.6, 1.0, 1.5)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2, 0.2])


@pytest.mark.parametrize(
    "setting",
    [{"learning_rate": float("inf")}, {"temperature": float("inf")}, {"final_learning_rate": -5.0},
     {"final_learning_rate": float("nan")}],
)  # fmt: skip
def test_numbers_that_are_not_finite_or_in_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"policy.{next(iter(setting))}: expected"):
        PolicyConfig(**setting)
