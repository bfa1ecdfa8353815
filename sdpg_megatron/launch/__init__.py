"""Launcher of one machine of a run, started by `scripts/launch.sh`; described in docs/launching.md."""
