"""SDPG inside Megatron-LM's own program: its arguments, model, optimizer, checkpoints and logger.

    torchrun ... -m sdpg_megatron.plugins.megatron_lm --sdpg my.yaml --dataloader-type external \\
        --calculate-per-token-loss <Megatron-LM's own arguments>
"""
