"""Evaluation on held-out problems: estimators, results on disk, tables."""
