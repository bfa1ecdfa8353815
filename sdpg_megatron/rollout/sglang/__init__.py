"""Rollouts by SGLang servers, and live publishing of weights into them."""
