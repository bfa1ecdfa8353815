"""Tests: `unit` in one process, `dist` on several ranks over Gloo."""
