"""Ada-DPO is online DPO with its loss."""

import pytest


def test_it_is_online_dpo_with_the_loss_ada_dpo(finite_game):
    options = {"loss_options.tau_max": 2.0}
    logs = []
    for name, settings in (("ada_dpo", options), ("online_dpo", {"loss": "ada_dpo", **options})):
        env, agent = finite_game.make(name, batch=8, **settings)
        logs.append([learnt for _, _, learnt in finite_game.play(env, agent, 3)[1]])
    assert logs[0] == logs[1]
    assert 0.1 <= logs[0][-1]["tau"] <= 2.0


def test_resumes_exactly(finite_game, tmp_path):
    finite_game.check_resume("ada_dpo", tmp_path / "saved", rounds=(2, 2))


def test_unknown_options_are_refused(finite_game):
    with pytest.raises(ValueError, match="no option 'tau'"):
        finite_game.make("ada_dpo", **{"loss_options.tau": 1.0})
