"""The command line: train, evaluate, inspect, merge, export and share adapters."""

from graftune.cli.app import main

__all__ = ["main"]
