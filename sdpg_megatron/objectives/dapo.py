"""DAPO: GRPO with a higher upper clip and one mean over all tokens, without a reference (arXiv 2503.14476, eq. 8).

Its dynamic sampling and its penalty for overlong responses act before the loss, on groups and rewards.
"""

from __future__ import annotations

from sdpg_megatron.objectives.grpo import GRPO


class DAPO(GRPO):
    name = "dapo"
