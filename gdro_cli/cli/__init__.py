"""The command line: Typer and Rich. A command imports its heavy dependencies itself, when it runs."""
