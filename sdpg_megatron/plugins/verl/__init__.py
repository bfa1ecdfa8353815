"""SDPG as an engine of verl: its registry and environment variables select it, without a fork.

    export VERL_USE_EXTERNAL_MODULES=sdpg_megatron.plugins.verl VERL_ENGINE_VENDOR=sdpg SDPG_CONFIG=sdpg.yaml
    python -m verl.trainer.main_ppo model_engine=megatron <verl's own arguments>

verl imports this module first; the import registers `engine.SDPGEngine`.
"""

from __future__ import annotations

import importlib
import logging

VENDOR = "sdpg"
"""Value of the environment variable ``VERL_ENGINE_VENDOR``."""


def _register() -> None:
    try:
        importlib.import_module("verl.workers.engine.megatron")
    except ImportError as error:  # verl has no Megatron engine in this process, and says so where it needs one
        logging.getLogger(__name__).warning("no engine %r in this process: %s", VENDOR, error)
        return
    from sdpg_megatron.plugins.verl.engine import SDPGEngine, registry

    registry().register("language_model", "megatron", device="cuda", vendor=VENDOR)(SDPGEngine)


_register()
