"""Tests with real SGLang servers."""
