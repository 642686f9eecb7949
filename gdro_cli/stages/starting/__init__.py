"""The folder that ``gdro init`` writes: a job to begin with."""
