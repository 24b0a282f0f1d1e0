# SPDX-License-Identifier: Apache-2.0
"""Generation arguments: greedy unless asked, stop strings honoured."""

import pytest

from vtoken.eval.model.generation import DEFAULT_MAX_NEW_TOKENS, cut_at, generation_options


@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 0, "top_p": 0.9}, {"temperature": None}, {"do_sample": True}]
)
def test_greedy_by_default(arguments):
    options = generation_options(arguments)
    assert (options["do_sample"], options["temperature"], options["top_p"], options["top_k"]) == (
        False,
        None,
        None,
        None,
    )


def test_samples_when_the_task_asks_for_a_temperature():
    options = generation_options({"temperature": 0.7, "top_p": 0.9, "num_beams": 1})
    assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 0.7, 0.9)


def test_length_of_the_answer():
    assert generation_options({})["max_new_tokens"] == DEFAULT_MAX_NEW_TOKENS
    assert generation_options({"max_new_tokens": 16})["max_new_tokens"] == 16
    assert generation_options({"max_new_tokens": 16}, 4)["max_new_tokens"] == 4


def test_arguments_that_would_be_ignored_are_named():
    with pytest.warns(UserWarning, match="penalty_alpha"):
        generation_options({"penalty_alpha": 0.6, "image_aspect_ratio": "pad"})


@pytest.mark.parametrize(
    ("until", "wanted"),
    [(None, "a b\n\nc."), ([], "a b\n\nc."), ("\n\n", "a b"), (["x", " b"], "a"), (["", "."], "a b\n\nc")],
)
def test_stops_at_the_first_stop_string(until, wanted):
    assert cut_at("a b\n\nc.", until) == wanted
