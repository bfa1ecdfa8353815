"""Estimates of a run's memory, communication and time, by arithmetic only; see docs/plan.md."""
