# SPDX-License-Identifier: Apache-2.0
"""``vtoken tune`` on the embedded model: a choice that `wrap` takes, nothing asked twice, sentences for the rest."""

import json
import re

import pytest
from taskfolder import FUNCTIONS, write_task_folder
from typer.testing import CliRunner

import vtoken
from vtoken.cli import app
from vtoken.eval.model.loaded import LoadedModel
from vtoken.eval.running.runner import Runner

FEW = ("-m", "mini-llava", "-t", "mini_exist", "--objective", "tokens", "--max-questions", "48")
EASY = ("-r", "idpruner,random", "-k", "0.5,0.25", "--retain", "0.6")


@pytest.fixture
def tune(private_cache, tmp_path, monkeypatch):
    """``tune("-r", "random")``: in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


@pytest.fixture(scope="module")
def tuned(private_cache, tmp_path_factory):
    """A folder in which an easy race was run, and what that printed."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, CliRunner().invoke(app, ["tune", *FEW, *EASY])


def numbers(folder):
    return json.loads((folder / "vtoken-tune" / "tune.json").read_text())


def test_ends_in_a_sentence_a_table_and_files(tuned):
    folder, done = tuned
    assert done.exit_code == 0, done.output
    assert re.search(
        r"(idpruner|random) 0\.25 retains at least 60 % of the accuracy of mini-llava on mini_exist, with 95 % "
        r"confidence \([\d.]+ % on \d+ questions\), at 25 % of the visual tokens per decoder layer\.",
        done.stdout,
    )
    assert "the choice" in done.stdout
    assert "144 tokens" in done.stdout
    page = (folder / "vtoken-tune" / "tune.html").read_text()
    assert "retains at least 60 %" in page
    assert "Plotly.newPlot" in page
    assert "<script src" not in page


def test_the_preset_builds_the_choice(tuned):
    folder, _ = tuned
    model, _ = vtoken.mini.load("mini-llava")
    vtoken.wrap(model, str(folder / "tuned.yaml"))
    choice = numbers(folder)["choice"]
    assert vtoken.get_reducer(folder / "tuned.yaml") == vtoken.get_reducer(choice)
    assert choice["keep"] == 0.25


def test_numbers_are_those_of_the_answers(tuned):
    """Scores read off the folder by hand: means over pictures of the same questions, unpruned and chosen."""
    folder, _ = tuned
    found, sums = numbers(folder), {}
    for path in (folder / "vtoken-tune" / "cells").glob("*/result.json"):
        reducer = json.loads(path.read_text())["cell"]["reducer"]
        samples = [json.loads(line) for line in path.with_name("samples.jsonl").read_text().splitlines()]
        name = (reducer["reducer"], reducer["keep"]) if reducer else "unpruned"
        assert len({sample["cluster"] for sample in samples}) == len(samples)  # mini_exist asks once about a picture
        sums.setdefault(name, [0.0, 0])
        sums[name][0] += sum(sample["score"] for sample in samples)
        sums[name][1] += len(samples)
    for setting in found["settings"]:
        score, count = sums[setting["reducer"], setting["keep"]]
        assert count == setting["units"]
        if count == sums["unpruned"][1]:
            assert setting["retained"] == pytest.approx(score / sums["unpruned"][0])
    assert found["unpruned"]["tokens"] == {"value": 144, "share": 1}
    kept = {setting["keep"]: setting["costs"]["tokens"] for setting in found["settings"]}
    assert kept[0.25] == {"value": 36, "share": 0.25}


def test_again_asks_and_measures_nothing(tuned, tune, monkeypatch):
    folder, first = tuned
    monkeypatch.chdir(folder)
    before = numbers(folder)

    def forbidden(self, cell):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Runner, "model", forbidden)
    again = tune(*FEW, *EASY)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert numbers(folder) == before


def test_an_interrupted_race_goes_on_and_comes_to_the_same_end(tuned, tune, monkeypatch, tmp_path):
    asked = []
    answer = LoadedModel.generate

    def stopping(self, *arguments):
        asked.append(len(arguments[0]))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(LoadedModel, "generate", stopping)
    stopped = tune(*FEW, *EASY)
    assert stopped.exit_code == 130
    assert "Stopped. The same command goes on from here." in stopped.stderr
    done = tune(*FEW, *EASY)
    assert done.exit_code == 0, done.output
    total = sum(setting["units"] for setting in numbers(tmp_path)["settings"])
    bare = max(setting["units"] for setting in numbers(tmp_path)["settings"])
    assert sum(asked) - asked[5] == total + bare  # nothing twice but the batch that was stopped
    answers = [
        {key: s[key] for key in ("reducer", "keep", "units", "retained", "verdict")}
        for s in numbers(tmp_path)["settings"]
    ]
    before = [{key: s[key] for key in answers[0]} for s in numbers(tuned[0])["settings"]]
    assert answers == before


def test_nothing_meets_the_target(tune, tmp_path):
    done = tune(*FEW, "-r", "random", "-k", "0.1", "--retain", "0.99")
    assert done.exit_code == 1
    assert "No setting is shown to retain 99 % of the accuracy of mini-llava on mini_exist" in done.stdout
    assert "More questions would not help" in done.stdout
    assert not (tmp_path / "tuned.yaml").exists()
    assert numbers(tmp_path)["choice"] is None


def test_too_few_questions_say_how_many_would_decide(tune):
    done = tune(*FEW, "-r", "todre", "-k", "0.5", "--retain", "0.97")
    assert done.exit_code == 1
    found = re.search(r"about (\d+) questions of each task would decide, there were 48", done.stdout)
    assert found, done.stdout
    assert 48 < int(found[1]) < 2000


def test_nothing_is_cheaper(tune, monkeypatch):
    from vtoken.eval.tune import asking

    measure = asking.measure

    def slow(*arguments, **options):
        found, failed = measure(*arguments, **options)
        for costs in found.values():
            costs["ttft"]["share"] = 1.25
        return found, failed

    monkeypatch.setattr(asking, "measure", slow)
    done = tune(*FEW, "-r", "random", "-k", "0.5", "--objective", "ttft")
    assert done.exit_code == 1
    assert "No setting is cheaper than the unpruned model in time to first token on this machine" in done.stdout
    assert "random 0.5 comes to 125 % of it" in done.stdout


def test_a_setting_that_raises_is_told_and_the_others_go_on(tune, monkeypatch):
    monkeypatch.setattr(vtoken.Random, "select", lambda self, ctx, budget: 1 / 0)
    done = tune(*FEW, *EASY)
    assert done.exit_code == 0, done.output
    assert "idpruner 0.25 retains" in done.stdout
    assert "random 0.5 failed: division by zero" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--retain", "1.5"],
            "retain=1.5 is not possible: give the share of the accuracy to keep, above 0 and at most 1",
        ),
        (["--retain", "98"], "retain=98 is not possible"),
        (["--retain", "0"], "retain=0 is not possible"),
        (["--retain", "-0.5"], "retain=-0.5 is not possible"),
        (["--retain", "nan"], "retain=nan is not possible"),
        (["--objective", "speed"], "Unknown objective 'speed': known are kv, prefill, tokens, ttft."),
        (["--objective", "token"], "Unknown objective 'token': did you mean 'tokens'?"),
        (["-r", "none"], "There is nothing to choose from: give at least one reducer, and a keep ratio below 1."),
        (["-r", "random", "-k", "1.0"], "There is nothing to choose from"),
        (["-m", "mini-llava,mini-internvl"], "Only one model can be tuned at a time"),
        (["-t", "mini_exists"], "Unknown task 'mini_exists': did you mean 'mini_exist'?"),
        (["-r", "idprune"], "Unknown reducer 'idprune': did you mean 'idpruner'?"),
    ],
)
def test_wrong_input_is_one_sentence(tune, monkeypatch, arguments, sentence):
    def forbidden(self, cell):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Runner, "model", forbidden)
    done = tune("-t", "mini_exist", *arguments)
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.output


SILENT = FUNCTIONS.replace('{"exact_match": float(results[0].strip() == doc["answer"])}', '{"submission": results[0]}')
LOUD = FUNCTIONS.replace('float(results[0].strip() == doc["answer"])', "7.5")


@pytest.mark.parametrize(
    ("functions", "sentence"),
    [
        (SILENT, "Task 'colors' logs no score per sample that vtoken can read"),
        (LOUD, "Task 'colors' scores a question with 7.5, and only scores from 0 to 1 can be bounded"),
    ],
)
def test_a_task_without_a_score_per_question_is_one_sentence(tune, tmp_path, functions, sentence):
    folder = write_task_folder(tmp_path / "tasks", "colors")
    (folder / "utils.py").write_text(functions)
    done = tune("-m", "mini-llava", "-t", str(folder), "-r", "random", "-k", "0.5", "--objective", "tokens")
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


def test_too_few_questions_for_a_picture(tune, tmp_path):
    folder = write_task_folder(tmp_path / "tasks", "colors")
    rows = [{"question": f"what color ? {i}", "answer": "red"} for i in range(4)]
    (folder / "questions.json").write_text(json.dumps(rows))
    done = tune("-m", "mini-llava", "-t", str(folder), "-r", "random", "-k", "0.5", "--max-questions", "2")
    assert done.exit_code == 2
    assert "2 questions are not enough for one picture: allow more." in done.stderr
