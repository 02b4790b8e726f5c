"""The command line: train, evaluate, inspect, merge, export and share adapters."""

from graftune.commands.app import main

__all__ = ["main"]
