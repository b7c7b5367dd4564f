"""One file per verb: the function behind the command of that name, and its result."""
