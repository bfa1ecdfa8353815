"""Prompts: reading data files, rendering for student and teacher, and the order of prompts in a run."""
