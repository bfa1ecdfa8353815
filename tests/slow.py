"""Tests that run with ``--all`` only, and why the others suffice for every change.

Each pattern (of node ids, as `fnmatch` reads them) has a reason. ``bash scripts/test.sh --all`` runs everything, and
must pass before a release.
"""

from __future__ import annotations

from collections.abc import Mapping

SLOW: Mapping[str, str] = {
    "tests/e2e/test_fuzz.py::*": "300 whole calls; tests/unit/test_fuzz_readers.py draws inputs for each reader",
    "tests/e2e/test_crash.py::test_so_does_one_of_two_ranks*": "one rank is killed at the same moments in every run",
    "tests/e2e/test_crash.py::test_ranks_do_not_outlive*": "waits for torchrun; unit/test_run_lock has the mechanism",
    "tests/e2e/test_full_disk.py::test_refused_again_and_again*": "each refusal has its test in unit/test_full_disk",
    "tests/e2e/test_examples.py::*tp2_pp2*": "the example's layouts are those of tests/dist; one rank runs every time",
    "tests/e2e/test_gpu_rehearsal.py::*": "a benchmark; before every call on a GPU",
    "tests/e2e/test_smollm2.py::test_a_step_on_two_ranks": "tiny models run on two ranks; SmolLM2 in the demo",
    "tests/e2e/test_gym.py::test_a_run_that_continues*": "e2e/test_continue, and unit/test_data_gym in two processes",
    "tests/e2e/test_train.py::test_a_run_outlives_its_terminal": "unit/test_streams and unit/test_signals",
    "tests/e2e/test_watchdog.py::test_a_rank_that_is_silent*?stopped?": "a dead one, and one that holds the lock, run",
    "tests/unit/test_recipes.py::test_a_recipe_walks*qwen3-4b*": "a dense and a mixture recipe are walked",
    "tests/dist/test_plan.py::test_an_update_takes_the_memory*": "a benchmark (benchmarks/plan.py)",
    "tests/dist/test_checkpoint.py::test_the_same_layout_goes_on_bit_for_bit?tp2_pp2-True?": "tp2_pp2 to cp2 runs",
    "tests/e2e/test_two_machines.py::*": "network namespaces; unit/test_launch has the rendezvous and its failures",
    "tests/dist/test_benchmark_step.py::test_the_script*": "a benchmark",
    "tests/unit/test_benchmark_head.py::test_the_script_writes*": "a benchmark",
    "tests/dist/test_checkpoint.py::test_another_layout_goes_on_to_rounding?cp2-dp2?": "cp2 from tp2_pp2 runs",
    "tests/dist/test_checkpoint.py::test_another_layout_goes_on_to_rounding?dp2_overlap-dp2?": "to dp2_overlap runs",
    "tests/dist/test_checkpoint.py::test_another_layout_goes_on_to_rounding?vpp2-one?": "one to tp2_pp2 runs",
    "tests/dist/test_checkpoint.py::test_another_layout_goes_on_to_rounding?tp2-pp2?": "one to tp2_pp2 runs",
    "tests/dist/test_checkpoint.py::test_another_layout_goes_on_to_rounding?dp2-tp2?": "tp2 to dp2_overlap runs",
    "tests/dist/test_head.py::test_shards_agree_with_the_dense_twin?21-4?": "24 and 5 tokens run on four shards",
    "tests/dist/test_plan.py::test_every_rank_holds*?llama?": "qwen3 and qwen3_moe run",
    "tests/dist/test_plan.py::test_every_rank_holds*?qwen2?": "qwen3 and qwen3_moe run",
    "tests/dist/test_plan.py::test_every_rank_holds*?mixtral?": "qwen3 and qwen3_moe run",
    "tests/dist/test_r*.py::test_a_step_is_the_same_on_every_layout?one_micro_batch?": "cp2_tp2 and ep2_tp2 run",
    "tests/dist/test_r*.py::test_a_step_is_the_same_on_every_layout?recompute*": "pp2_tp2_recompute runs",
    "tests/dist/test_r*.py::test_a_step_is_the_same_on_every_layout?dp2?": "dist/test_invariance has two replicas",
    "tests/dist/test_r*.py::test_a_step_is_the_same_on_every_layout?tp2?": "cp2_tp2 and padded_tp2 run",
    "tests/dist/test_r*.py::test_a_step_is_the_same_on_every_layout?cp2_ep2?": "cp2_tp2 and ep2_tp2 run",
    "tests/dist/test_teachers.py::test_layouts_agree?[tp]p2-*": "tp2_sp_pp2 runs",
    "tests/dist/test_skips.py::test_a_step_that_is_not_finite*any_rank?[td]p2?": "tp2_dp2 runs",
    "tests/dist/test_skips.py::test_a_step_that_is_not_finite*?dp2_plain*": "dp2_overlap runs",
    "tests/dist/test_step.py::test_layouts*?tied-?p2_plain_optimizer?": "dist/test_invariance and dist/test_optimizer",
    "tests/dist/test_step.py::test_layouts*?untied-pp2?": "untied-tp2_sp_pp2 runs",
    "tests/dist/test_step.py::test_layouts*?untied-vpp2?": "untied-tp2_sp_pp2 and tied ones run",
    "tests/dist/test_step.py::test_an_objective_over_sequences*?tied-[mvd]*": "tp2 and cp2 run",
    "tests/dist/test_checkpoint.py::test_another_kind_of_teacher*?ema-ema?": "current-ema and ema-every run",
    "tests/dist/test_checkpoint.py::test_another_kind_of_teacher*?ema-current?": "current-ema and ema-every run",
    "tests/dist/test_checkpoint.py::test_a_disk_that_refuses*?tp2-1-False?": "tp2-1-True and one-0-False run",
    "tests/dist/test_head.py::test_shards_agree_with_the_dense_twin?*-2?": "four shards run",
    "tests/dist/test_head.py::test_sizes_of_chunks_and_tiles*?sizes[23]?": "sizes0 and sizes1 run",
    "tests/dist/test_head_megatron.py::test_the_wrappers*?tied-[tpd]p2?": "tp2_pp2_sp and dp2_overlap run",
    "tests/dist/test_head_megatron.py::test_the_wrappers*?tied-pp2_[sw]*": "one stage runs so",
    "tests/dist/test_head_megatron.py::test_the_wrappers*?tied-dp2_overlap_recompute?": "pp2_recompute runs",
    "tests/dist/test_optimizer.py::test_bfloat16_on_other_layouts?dp2?": "dp2_overlap runs",
    "tests/e2e/test_ahead.py::test_a_run_that_is_stopped*?after?": "before runs",
    "tests/e2e/test_methods.py::test_a_run_with_a_teacher*?every?": "ema_pp2 runs",
    "tests/e2e/test_train.py::test_on_several_ranks?pp2?": "tp2_pp2_sp runs",
    "tests/e2e/test_continue.py::test_a_branch_without_a_change*": "a branch with changes runs",
    "tests/unit/test_recipes.py::test_a_recipe_walks*?one-gpu*": "unit/test_plan walks a dense model",
}
