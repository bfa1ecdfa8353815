"""Pure mathematics of the training objectives."""
