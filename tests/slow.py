"""Tests that run with ``--all`` only, and why the others suffice for every change.

Each pattern (of node ids, as `fnmatch` reads them) has a reason. ``bash scripts/test.sh --all`` runs everything, and
must pass before a release.
"""

from __future__ import annotations

from collections.abc import Mapping

SLOW: Mapping[str, str] = {}
