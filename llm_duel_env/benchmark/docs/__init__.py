"""Generated documentation: pages of agents and losses, the table of agents, tables of options (`make docs`)."""
