"""Generated documentation: a page per agent, the page of the losses, the table of agents, tables of options (`make docs`)."""
