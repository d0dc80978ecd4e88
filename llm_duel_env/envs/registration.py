"""The ``duel/`` ids."""


def register_envs() -> None:
    """Registers the ``duel/`` environments with Gymnasium."""
