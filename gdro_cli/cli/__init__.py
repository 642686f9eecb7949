"""The command line: Typer and Rich. Whatever is heavy is imported inside the command that needs it."""
