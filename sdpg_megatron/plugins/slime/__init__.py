"""SDPG inside slime, by its function paths: docs/plugin.md has the command line.

`samples` has the hook of slime's rollout manager, and needs no megatron-core. `hooks` has those of its actors.
"""
