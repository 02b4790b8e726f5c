"""Objectives: modules that call a model and return its loss and its outputs."""

from graftune.integrations.objectives.class_names import ClassNameClassifier

__all__ = ["ClassNameClassifier"]
