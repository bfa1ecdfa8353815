"""Process-level concerns: rank environment, signals, standard streams. Imports nothing heavy."""
