# SPDX-License-Identifier: Apache-2.0
"""``vtoken show``: what is drawn, said and refused."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vtoken
from vtoken import mini
from vtoken.cli import app
from vtoken.eval.show.gallery import Prompt, gallery
from vtoken.eval.show.sheet import as_html, as_picture, captions, heading
from vtoken.mini.documents import held_out


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(held_out("attr", 1)[0].images[0]).save(path)
    return path


def test_without_arguments_the_bundled_picture_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run()
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("unpruned: “")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"{name}, keep {keep}" for name in ("idpruner", "todre", "fastv") for keep in (0.25, 0.1)
    ]
    assert "36 of 144 tokens" in lines[1]
    assert "144 of 144 tokens, 14 behind the last layer" in lines[6]
    with Image.open(tmp_path / "kept.png") as sheet:
        assert sheet.width > 2 * 384
        assert sheet.height > 4 * 384


def test_a_page_holds_every_picture(photo, tmp_path):
    page = tmp_path / "kept.html"
    done = run(photo, "-r", "divprune,vtw", "-k", "0.5,9", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/jpeg;base64,") == 5
    assert "divprune, keep 9" in text
    assert "none behind the last layer" in text  # vtw lets all go
    assert "unpruned" not in done.stdout  # nothing was asked


def test_a_reducer_that_cannot_work_here_says_why(photo):
    model, processor = mini.load("mini-qwen2.5-vl")
    prompt = Prompt(model, processor, [Image.open(photo)], None, 8)
    found = gallery(prompt, "mini-qwen2.5-vl", None, ["globalcom2", "random"], [0.5])
    (_, (refused,)), (_, (drawn,)) = found.rows
    assert refused.picture is None
    assert "[CLS]" in refused.why
    assert drawn.kept == drawn.tokens // 2
    assert as_picture(found).height > 2 * drawn.picture.height
    assert refused.why in as_html(found).replace("&#39;", "'")


def test_clips_become_a_strip_and_come_after_pictures(photo):
    document = held_out("video", 1)[0]
    clip = np.stack(document.images)
    model, processor = mini.load("mini-qwen2.5-vl")
    prompt = Prompt(model, processor, [clip, Image.open(photo)], document.question, 8)
    shown = prompt.show(vtoken.get_reducer("random", keep=0.5))
    frames = len(clip) // 2  # the tower takes them in pairs
    assert shown.picture.width == pytest.approx((1 + frames) * 384 + frames * 8, abs=2)
    assert shown.answer
    assert captions(shown)[0] == f"{shown.kept} of {shown.tokens} tokens"
    picture = np.asarray(shown.picture)[:, :384].mean()  # the picture stands first, as in the token map
    assert picture < np.asarray(Image.open(photo)).mean()


def test_the_picture_says_which_model_and_question():
    picture, question = Image.new("RGB", (48, 48)), "what is it ?"
    model, processor = mini.load("mini-llava")
    found = gallery(Prompt(model, processor, [picture], question, 4), "mini-llava", question, ["random"], [1.0])
    assert heading(found)[:2] == ["mini-llava: 144 visual tokens", "Question: what is it ?"]
    assert found.rows[0][1][0].answer == found.answer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.png"], "There is no picture 'nothing.png'"),
        (["{text}"], "cannot be read as a picture"),
        (["{clip}"], "cannot be read as a clip"),
        (["{photo}", "-r", "fopro"], "did you mean 'fopru'"),
        (["{photo}", "-k", "1.5"], "not a ratio"),
        (["{photo}", "-r", ""], "at least one reducer"),
        (["{photo}", "-m", "mini-lava"], "mini-llava"),
        (["{photo}", "--out", "kept.gif"], "has no known ending"),
        (["{photo}", "--out", "no/where/kept.png"], "folder that does not exist"),
        (["{photo}", "-q", "word " * 5000], "ask a shorter question"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, clip = tmp_path / "text.png", tmp_path / "text.mp4"
    for path in (text, clip):
        path.write_text("no picture")
    done = run(*(one.format(photo=photo, text=text, clip=clip) for one in arguments))
    assert done.exit_code == 2
    assert words in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
