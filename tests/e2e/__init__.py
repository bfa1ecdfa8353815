"""Whole runs, through the command line, as a user starts them."""
