"""One machine's part of a run on one or many: `scripts/launch.sh` calls it, and docs/launching.md says how it works."""
