"""The command line: the Typer app, a command per verb, and everything that is printed."""
