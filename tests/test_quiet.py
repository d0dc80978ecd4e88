from transformers.utils import logging

from llm_duel_env.quiet import no_progress_bars


def test_bars_are_off_within_and_as_they_were_after():
    shown = logging.is_progress_bar_enabled()
    for wanted in (True, False):
        (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
        with no_progress_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is wanted
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
