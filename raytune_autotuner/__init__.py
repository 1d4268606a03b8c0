"""Finds the engine settings to run, for a model, its hardware, its traffic and its latency promises."""

__version__ = "0.1.0"
