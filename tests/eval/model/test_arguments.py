# SPDX-License-Identifier: Apache-2.0
"""``--model_args``: every argument has an owner, or there is a sentence."""

import pytest

from vtoken.eval.model.arguments import positive_int, split_arguments


def test_shares_arguments_out():
    spec, reducer = split_arguments(
        {"pretrained": "a/b", "dtype": "bfloat16", "reducer": "fopru", "keep": 0.25, "strategy": "row", "batch_size": 4}
    )
    assert (spec.pretrained, spec.dtype) == ("a/b", "bfloat16")
    assert (reducer.name, reducer.keep, reducer.strategy) == ("fopru", 0.25, "row")


@pytest.mark.parametrize("name", [None, "none", "unpruned"])
def test_no_reducer(name):
    assert split_arguments({"pretrained": "a/b", "reducer": name})[1] is None


def test_inline_mapping():
    reducer = split_arguments({"pretrained": "a/b", "reducer": '{"reducer": "fopru", "keep": 0.5}'})[1]
    assert (reducer.name, reducer.keep) == ("fopru", 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"reducer": "fopru"}, "model is missing"),
        ({"pretrained": "a/b", "reducer": "foprue"}, "did you mean 'fopru'"),
        ({"pretrained": "a/b", "reducer": "fopru", "kep": 0.5}, "Unknown argument 'kep': did you mean 'keep'"),
        ({"pretrained": "a/b", "reducer": "fopru", "devise": "cpu"}, "did you mean 'device'"),
        ({"pretrained": "a/b", "keep": 0.5}, "Unknown argument 'keep'"),
        ({"pretrained": "a/b", "max_batch_size": 8}, "did you mean 'batch_size'"),
        ({"pretrained": "a/b", "reducer": "fopru", "keep": 0}, "leave no token"),
        ({"pretrained": "a/b", "reducer": "fopru", "keep": "abc"}, "is not a number"),
        ({"pretrained": "a/b", "dtype": "float31"}, "did you mean 'float32'"),
        ({"pretrained": "a/b", "device": "cpu", "device_map": "auto"}, "not both"),
    ],
)
def test_wrong_arguments_are_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        split_arguments(arguments)


@pytest.mark.parametrize("value", [0, -1, "x", 1.5, None])
def test_counts_are_positive_integers(value):
    with pytest.raises(ValueError, match=r"batch_size=.* is not possible"):
        positive_int("batch_size", value)


def test_counts_may_come_as_text():
    assert positive_int("batch_size", "8") == 8
