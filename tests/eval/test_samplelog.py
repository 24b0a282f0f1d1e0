# SPDX-License-Identifier: Apache-2.0
"""The log of answers survives what a kill leaves behind."""

import pytest

from vtoken.eval.samplelog import SampleLog


@pytest.fixture
def path(tmp_path):
    with SampleLog(tmp_path / "deep" / "answers.jsonl") as log:
        log.add({"a": {"text": "one"}, "b": {"text": "two"}})
    return tmp_path / "deep" / "answers.jsonl"


def test_reads_back_what_was_added(path):
    with SampleLog(path) as log:
        assert (len(log), log.get("a"), log.get("c")) == (2, {"text": "one"}, None)


@pytest.mark.parametrize("torn", [b'{"key": "c", "te', b'{"key": "c", "text": "thr"}', b"\xff\xfe", b"{}\n", b"[1]\n"])
def test_a_torn_line_is_cut_off_and_written_again(path, torn):
    path.write_bytes(path.read_bytes() + torn)
    with SampleLog(path) as log:
        assert len(log) == 2
        log.add({"c": {"text": "three"}})
    with SampleLog(path) as log:
        assert log.get("c") == {"text": "three"}
    assert path.read_bytes().count(b"\n") == 3


def test_every_prefix_of_the_file_is_a_valid_log(path):
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with SampleLog(path) as log:
            assert len(log) == whole[:end].count(b"\n")
