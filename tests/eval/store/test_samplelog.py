# SPDX-License-Identifier: Apache-2.0
"""The log of answers survives what a kill leaves behind."""

import pytest

from vtoken.eval.store.samplelog import SampleLog


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


def test_answers_of_other_processes_are_found_but_not_written_again(path):
    own = path.with_name("answers-1.jsonl")
    path.write_bytes(path.read_bytes() + b'{"key": "c", "te')  # its owner is writing
    with SampleLog(own, beside=[path, own]) as log:
        assert log.get("a") == {"text": "one"}
        log.add({"d": {"text": "four"}})
        path.write_bytes(path.read_bytes() + b'xt": "three"}\n')
        log.read([path])
        assert log.get("c") == {"text": "three"}
    assert own.read_bytes().count(b"\n") == 1
    assert path.read_bytes().count(b"\n") == 3
