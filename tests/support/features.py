# SPDX-License-Identifier: Apache-2.0
"""Which feature a test is evidence for: the columns of the README's table of families, in their order there.

Only tests with a parameter ``family`` count (``pytest --families-report PATH``, see ``tests/conftest.py``). A test that
finds a documented sentence instead of an answer says so with ``record_property("refused", feature)``: it is then
evidence for that sentence and not for the feature.
"""

from __future__ import annotations

FEATURES: dict[str, tuple[str, ...]] = {
    "keep all = unwrapped": ("test_keep_all_is_bit_identical_and_unwrap_leaves_no_trace",),
    "drop = mask at every step": ("test_dropping_equals_hiding_at_every_decode_step",),
    "batch = alone": ("test_batch_equals_alone",),
    "every reducer": ("test_budget_is_exact_for_every_image", "test_batch_equals_alone_and_repeats"),
    "cache = no cache": ("test_cache_equals_no_cache",),
    "smaller cache": ("test_cache_reports_logical_and_stores_fewer",),
    "static cache": ("test_static_cache_gives_the_same_ids",),
    "beams": ("test_beam_search_and_return_sequences",),
    "assisted": ("test_prompt_lookup_assisted",),
    "several turns": ("test_second_turn_on_the_pruned_cache",),
    "second image": ("test_a_second_image_on_the_pruned_cache",),
    "clips": ("test_clips", "test_pictures_clips_and_text_in_one_batch"),
    "compact positions": ("test_compact_positions_renumber",),
    "labels": ("test_labels_give_the_loss_of_the_shortened_sequence",),
    "right padding": ("test_right_padding_in_a_forward_pass",),
    "gradients": ("test_a_pass_that_keeps_gradients",),
    "checkpointing": ("test_gradient_checkpointing",),
    "decoder attention": ("test_decoder_rows_equal_eager",),
    "encoder attention": (
        "test_encoder_statistics_equal_eager",
        "test_encoder_maps_follow_the_anyres_packing",
        "test_encoder_maps_of_packed_towers",
        "test_encoder_maps_of_pooled_tiles",
        "test_encoder_maps_of_pictures_that_a_mask_separates",
    ),
    "token map": ("test_painting_the_input_of_the_tower", "test_painting_the_original_picture"),
    "shorten": ("test_shorter_prompt_equals_wrapped_model", "test_merged_features", "test_shorter_clips"),
    "FA2 (emulated)": (
        "test_flash_attention_2",
        "test_flash_attention_2_in_a_second_turn",
        "test_flash_attention_beyond_a_sliding_window_is_refused",
    ),
    "bf16": ("test_bfloat16", "test_bfloat16_runs"),
    "autocast": ("test_autocast", "test_every_reducer_keeps_its_budget"),
    "compile": ("test_torch_compile_of_the_model", "test_static_cache_with_a_compiled_decode_step"),
    "PEFT": ("test_peft",),
    "offload": ("test_accelerate_offload_hooks",),
    "saved": ("test_saving_a_wrapped_model_saves_the_stock_one",),
    "deepcopy": ("test_deepcopy_of_a_wrapped_model",),
}
FEATURE_OF = {test: feature for feature, tests in FEATURES.items() for test in tests}
BETWEEN = ("between", "inside", "both", "drop all", "exit")
COLUMNS: dict[str, tuple[tuple[str, tuple[str, ...] | None], ...]] = {
    "keep all = unwrapped": (("test_keep_all_is_bit_identical_and_unwrap_leaves_no_trace", None),),
    "drop before = mask": (
        ("test_dropping_equals_hiding_at_every_decode_step", ("before",)),
        ("test_kept_positions_are_refused", None),
    ),
    "drop between layers = mask": (
        ("test_dropping_equals_hiding_at_every_decode_step", BETWEEN),
        ("test_cuts_between_layers_are_refused", None),
    ),
    "batch = alone": (("test_batch_equals_alone", None),),
    "cache = no cache": (("test_cache_equals_no_cache", None),),
    "several turns": (("test_second_turn_on_the_pruned_cache", None),),
    "static cache": (("test_static_cache_gives_the_same_ids", None),),
    "beams": (("test_beam_search_and_return_sequences", None),),
    "clips": (("test_clips", None), ("test_pictures_clips_and_text_in_one_batch", None)),
    "encoder attention": (("test_encoder_", None),),
    "decoder attention": (("test_decoder_rows_", None),),
}
"""Columns of the table of all types: what a test's name begins with, and the plans with which it counts."""


def column_of(test: str, params: dict[str, object]) -> str | None:
    """The column that a test with a parameter ``family`` is evidence for."""
    for column, sources in COLUMNS.items():
        for name, plans in sources:
            if test.startswith(name) and (plans is None or params.get("plan") in plans):
                return column
    return None


OUTCOMES = ("passed", "failed", "skipped", "refused")

KINDS = {
    "test_drafts": "drafts, labels, generated tokens without a cache",
    "test_packed": "packed rows",
    "test_cache_object": "the cache as the user's object",
    "test_hidden": "hidden pictures, prompts that end with one",
    "test_training": "training",
    "test_backends": "backends and tracing",
    "test_entry_points": "entry points",
    "test_after_error": "after an error",
    "test_towers": "towers that the type does not promise",
}
"""Files of tests by the kind of fault that they make impossible: their cases are counted by reducer and by family."""
