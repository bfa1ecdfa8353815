"""This process: its place among the ranks, its signals and its standard streams. Imports nothing heavy."""
