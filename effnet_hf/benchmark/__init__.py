"""Timing: our own steps, the input pipelines, and the peers beside us."""
