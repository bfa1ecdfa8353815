"""SDPG inside other training programs: Megatron-LM, slime, verl.

`megatron_lm`, `slime` and `verl` adapt one program each. The other modules are what such an adapter needs: `schedule`
(passes before the training pass), `hidden` (hidden states instead of logits), `batch` (a host's batch as a
`MicroBatch`) and `report` (metrics in a host's form).
"""
