"""The zoo: one published agent per file."""

if __name__ != "llm_duel_env.agents":
    raise ImportError(f"import llm_duel_env.agents, not {__name__}: the short name is only a link for readers")
