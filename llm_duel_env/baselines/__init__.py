"""What a new agent must beat."""

if __name__ != "llm_duel_env.baselines":
    raise ImportError(f"import llm_duel_env.baselines, not {__name__}: the short name is a link for readers, not a package")
