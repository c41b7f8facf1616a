"""Evaluation tasks and the report. A task is a module with a function `run` (docs/adding_a_task.md)."""
