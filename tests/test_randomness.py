import numpy as np
import torch
from scipy import stats

from llm_duel_env.randomness import generator, torch_generator, uniforms


def test_a_stream_is_its_key():
    assert generator(3, "label", 7).random() == generator(3, "label", 7).random()
    draws = {generator(*key).random() for key in [(3, "label", 7), (4, "label", 7), (3, "flip", 7), (3, "label", 8)]}
    assert len(draws) == 4


def test_a_key_and_the_same_key_padded_with_zeros_are_two_streams():
    assert generator(0, "x").random() != generator(0, "x", 0).random()
    assert generator(0, "x", 0).random() != generator(0, "x", 0, 0).random()
    draws = [torch.rand((), generator=torch_generator(*key)).item() for key in [(0, "x"), (0, "x", 0), (0,), (0, 0)]]
    assert len(set(draws)) == 4


def test_torch_streams_differ_and_repeat():
    def draw(*key):
        return torch.rand(4, generator=torch_generator(*key))

    assert torch.equal(draw(0, "a", 1), draw(0, "a", 1))
    assert not torch.equal(draw(0, "a", 1), draw(0, "a", 2))


def test_uniforms_do_not_depend_on_their_batch():
    numbers = np.arange(64)
    whole = uniforms(5, "label", numbers)
    parts = np.concatenate([uniforms(5, "label", part) for part in np.split(numbers, [3, 17])])
    np.testing.assert_array_equal(whole, parts)


def test_uniforms_are_uniform_and_uncorrelated():
    draws = uniforms(0, "label", np.arange(4000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


def test_uniforms_of_nearby_names_seeds_and_numbers_are_unrelated():
    rows = [uniforms(seed, name, np.arange(2000)) for seed in (0, 1) for name in ("a/1", "a/2", "b/1")]
    correlation = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(correlation).max() < 0.1
    far = uniforms(0, "a", np.array([-1, 0, 2**40, 2**62]))
    assert len(set(far)) == 4
    strided = uniforms(0, "a", np.arange(4000) * 20)  # as in M prompts with E draws each
    assert stats.kstest(strided, "uniform").pvalue > 1e-3
