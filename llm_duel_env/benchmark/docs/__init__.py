"""Generated documentation: a page per agent, the page of the losses, and the README's table of agents (`make docs`)."""
