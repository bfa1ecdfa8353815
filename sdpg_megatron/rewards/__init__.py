"""Verifiers, reward shaping and group filters."""
