# SPDX-License-Identifier: Apache-2.0
"""Trained gates and scorers: they learn, go on where they were stopped, and say what is wrong."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional
from typer.testing import CliRunner

import vtoken
import vtoken.mini
from vtoken import checkpoints
from vtoken.cli import app
from vtoken.mini.questions import KINDS
from vtoken.observe import Observe
from vtoken.reducers.explain import first_layer_maps, predict
from vtoken.reducers.gate import gate_logits, load_gates
from vtoken.training import JsonlSource, MiniSource, Plan, collate, exit_divergence, train_gate, train_scorer
from vtoken.training.gate import answer_logits, make_gates, may_exit
from vtoken.training.scorer import make_scorer

SMALL = Plan(steps=4, batch_size=2, lr=1e-2)


@pytest.fixture(scope="module")
def mini():
    return vtoken.mini.load("mini-llava")


class Constant:
    """Always the same examples, so that a few steps can learn them."""

    def __init__(self, size=4):
        self.examples = MiniSource().draw(0, size)

    def draw(self, number, size):
        return self.examples[:size]


# ------------------------------------------------------------------------------------------------------------ examples
def test_batches_hold_what_the_model_answers(mini):
    model, processor = mini
    source = MiniSource(1)
    examples = source.draw(3, len(KINDS))
    assert [(e.prompt, e.answer) for e in examples] == [(e.prompt, e.answer) for e in source.draw(3, len(KINDS))]
    batch = collate(processor, examples)
    with torch.no_grad():
        logits = answer_logits(model, batch.whole, batch.labels)
        ids = model.generate(**batch.prompt, max_new_tokens=6, do_sample=False)[:, batch.prompt["input_ids"].shape[1] :]
    forced = [processor.decode(row[asked]) for row, asked in zip(logits.argmax(2), batch.labels != -100, strict=True)]
    free = [processor.decode(row[row != processor.tokenizer.pad_token_id]) for row in ids]
    wanted = [processor.decode(row[row != -100]) for row in batch.labels]
    assert sum(a == b for a, b in zip(free, wanted, strict=True)) >= len(KINDS) - 2
    assert [a == c for a, c in zip(forced, wanted, strict=True)] == [b == c for b, c in zip(free, wanted, strict=True)]


def test_json_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "prompt": f"what {n} ?", "answer": str(n)} for n in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = JsonlSource(tmp_path / "data.jsonl")
    epoch = [e.answer for n in range(5) for e in source.draw(n, 1)]
    assert sorted(epoch) == list("01234")
    assert [e.answer for e in source.draw(0, 5)] == epoch
    assert [e.answer for e in source.draw(1, 5)] != epoch
    for text, words in (
        ("", "is empty"),
        ("{", "Line 1 of .* is no example"),
        ('{"image": "a.png", "prompt": "x"}', "KeyError: 'answer'"),
        ('{"image": "b.png", "prompt": "x", "answer": "y"}', "b.png', which is not there"),
        ('{"image": "a.png", "prompt": "x", "answer": ""}', "not empty"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            JsonlSource(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="There is no file"):
        JsonlSource(tmp_path / "missing.jsonl")


# ---------------------------------------------------------------------------------------------------------------- gate
def test_labels_follow_the_two_conditions_of_the_authors():
    labels = torch.tensor([[3, 1, -100]] * 4)
    full = functional.one_hot(torch.tensor([[3, 1, 0]] * 4), 5).float() * 4
    blind = full.clone()
    blind[1] = blind[1].flip(1)  # another answer
    blind[2, :, 4] += 2.0  # the same answer, with a larger loss
    blind[3, 2] = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])  # a difference on the padding only
    assert may_exit(full, blind, labels).tolist() == [True, False, False, True]


def test_a_gate_learns_when_to_exit(mini, tmp_path):
    """A fresh gate of the deepest layer says no; after training on easy examples it exits, and the answers stay."""
    model, processor = mini
    out = tmp_path / "gate.safetensors"
    source = Constant(8)
    losses = train_gate(model, processor, source, out, plan=Plan(24, 8, 1e-2), hidden=16)
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert checkpoints.load(str(out), "gate").metadata["part"] == "dyvte gate"
    batch = collate(processor, source.examples)
    with torch.no_grad():
        plain = answer_logits(model, batch.whole, batch.labels).argmax(2)
        with vtoken.reduce(model, vtoken.DyVTE(exit="gate", gate=str(out), min_layer=1)):
            model(**batch.prompt)
            stats = vtoken.stats(model)
            assert stats.images[0].kept == 144
            assert stats.tokens_per_layer < stats.tokens_in
            left = [image.kept_last for image in stats.images]
            gated = answer_logits(model, batch.whole, batch.labels).argmax(2)
    assert left.count(0) >= 6
    assert (plain == gated)[batch.labels != -100].float().mean() > 0.7


def test_the_reducer_computes_what_was_trained():
    gates = make_gates(8, 3, 6, 0)
    summary = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    weights = dict(gates.named_parameters())
    torch.testing.assert_close(gates["1"](summary), gate_logits(summary, weights["1.0.weight"], weights["1.2.weight"]))


# -------------------------------------------------------------------------------------------------------------- scorer
def test_a_scorer_learns_relevance(mini, tmp_path):
    model, processor = mini
    out, seen = tmp_path / "scorer.safetensors", []
    source = Constant(4)
    train_scorer(model, processor, source, out, plan=Plan(30, 4, 2e-2), report=lambda step, found: seen.append(found))
    assert seen[-1]["found"] > seen[0]["found"] + 0.1
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.1
    batch = collate(processor, source.examples)
    with vtoken.reduce(model, vtoken.Explain(keep=0.25, checkpoint=str(out))), torch.no_grad():
        model(**batch.prompt)
        assert [image.kept_last for image in vtoken.stats(model).images] == [36] * 4


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_the_scorer_is_a_convolution_over_each_view(family):
    """Against the network itself, called on one view at a time; a ragged batch changes nothing."""
    model, inputs = tiny.make(family, (1, 2))
    network, seen = make_scorer(8, 5, 0), []
    with vtoken.reduce(model, Observe(lambda ctx: seen.append((first_layer_maps(ctx), ctx)), (0,))), torch.no_grad():
        model(**inputs)
    maps, ctx = seen[0]
    with torch.no_grad():
        found = predict(maps, ctx, dict(network.named_parameters()))
        for item, layout in enumerate(ctx.layouts):
            for view, (rows, columns) in enumerate(layout.grids):
                here = layout.view == view
                if int(here.sum()) != rows * columns:
                    continue  # part of the view is cut away as padding
                picture = maps[item, : len(layout.view)][here].T.view(1, 8, rows, columns)
                torch.testing.assert_close(found[item, : len(layout.view)][here], network(picture).flatten())


def test_cutting_at_the_first_layer_is_cutting_before_it(tmp_path):
    """The mask backend, and a cut of the same tokens before the language model, give the same logits."""
    model, inputs = tiny.make("llava", (1, 2))
    network, out = make_scorer(8, 5, 0), tmp_path / "scorer.safetensors"
    checkpoints.save(out, network.state_dict(), {})
    reducer, kept = vtoken.Explain(keep=0.4, checkpoint=str(out)), []
    with vtoken.reduce(model, reducer), torch.no_grad():
        logits = model(**inputs).logits
        kept = vtoken.stats(model).kept[-1][1]
    with vtoken.reduce(model, reducer, backend="mask"), torch.no_grad():
        hidden = model(**inputs).logits
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE_ID)
    torch.testing.assert_close(hidden[text], logits[text], atol=5e-5, rtol=1e-4)
    before = vtoken.IDPruner(keep=0.4, lam=1.0, scorer=lambda ctx: kept.float())
    with vtoken.reduce(model, before), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[text], logits[text], atol=5e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- going on, wrong input
class Stopped(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("train", [train_gate, train_scorer])
def test_a_stopped_training_goes_on(mini, tmp_path, monkeypatch, train):
    monkeypatch.setattr("vtoken.training.loop.SAVED_EVERY", 2)
    plan = Plan(4, 2, 1e-2)

    def stop(step, _):
        if step == 3:
            raise Stopped

    train(*mini, MiniSource(), tmp_path / "whole.safetensors", plan=plan)
    with pytest.raises(Stopped):
        train(*mini, MiniSource(), tmp_path / "part.safetensors", plan=plan, report=stop)
    with pytest.raises(ValueError, match=r"of another training \(lr 0.01, now 0.1\)"):
        train(*mini, MiniSource(), tmp_path / "part.safetensors", plan=Plan(4, 2, 0.1))
    assert len(train(*mini, MiniSource(), tmp_path / "part.safetensors", plan=plan)) == 2
    whole, part = (checkpoints.load(str(tmp_path / f"{name}.safetensors"), "x") for name in ("whole", "part"))
    assert whole.metadata == part.metadata
    for name, value in whole.tensors.items():
        torch.testing.assert_close(part.tensors[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.safetensors", "whole.safetensors"]
    with pytest.raises(ValueError, match="is there already: start over with --fresh"):
        train(*mini, MiniSource(), tmp_path / "part.safetensors", plan=plan)


def test_damaged_files_are_sentences(mini, tmp_path):
    for name in ("bad.safetensors", "bad.pt"):
        (tmp_path / name).write_bytes(b"garbage" * 100)
        with pytest.raises(ValueError, match=r"cannot be read .* it is damaged"):
            load_gates(str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no mapping of names to tensors"):
        load_gates(str(tmp_path / "list.pt"))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pt")  # a pickle that would run code
    with pytest.raises(ValueError, match="cannot be read"):
        load_gates(str(tmp_path / "code.pt"))
    (tmp_path / "new.safetensors.state").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"is damaged .* start over with --fresh"):
        train_gate(*mini, MiniSource(), tmp_path / "new.safetensors", plan=SMALL, hidden=4)
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        train_gate(*mini, MiniSource(), tmp_path / "new.pt", plan=SMALL)


def test_a_checkpoint_of_another_model_is_a_sentence(tmp_path):
    model, inputs = tiny.make("llava", (1,))
    checkpoints.save(tmp_path / "s.safetensors", make_scorer(6, 5, 0).state_dict(), {})
    with (
        vtoken.reduce(model, vtoken.Explain(keep=0.5, checkpoint=str(tmp_path / "s.safetensors"))),
        pytest.raises(ValueError, match="reads 6 attention maps, but this model has 8"),
    ):
        model(**inputs)


# ------------------------------------------------------------------------------------------------------------- command
@pytest.mark.parametrize("command", ["train-gate", "train-scorer"])
def test_the_command_trains_and_says_how_to_use_it(tmp_path, command):
    arguments = [command, "--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "part.safetensors")]
    done = CliRunner().invoke(app, arguments + (["--hidden", "8"] if command == "train-gate" else []))
    assert done.exit_code == 0, done.output
    assert "Written:" in done.stdout
    part = command.removeprefix("train-")
    load = {"gate": load_gates, "scorer": vtoken.reducers.explain.load_scorer}[part]
    assert load(str(tmp_path / "part.safetensors"))


WRONG = {
    "steps": (["--steps", "0"], "steps=0: give an int of at least 1"),
    "rate": (["--lr", "0"], "lr=0.0: give a number above 0"),
    "model": (["-m", "mini-lava"], "Unknown model 'mini-lava'"),
    "no data": (["-m", "llava-hf/llava-1.5-7b-hf"], "needs examples: give --data"),
    "data": (["--data", "nowhere.jsonl"], "There is no file 'nowhere.jsonl'"),
    "out": (["--out", "gate.bin"], "written as .safetensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_sentence(case):
    arguments, words = WRONG[case]
    done = CliRunner().invoke(app, ["train-gate", *arguments])
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0


# ------------------------------------------------------------------------------------------------------ what is shipped
@pytest.mark.parametrize("preset", ["dyvte-mini", "explain-mini"])
def test_shipped_checkpoints_fit_the_embedded_model(mini, preset):
    model, processor = mini
    batch = collate(processor, MiniSource(2).draw(0, 8))
    with vtoken.reduce(model, preset), torch.no_grad():
        blind = answer_logits(model, batch.whole, batch.labels).argmax(2)
        model(**batch.prompt)
        assert vtoken.stats(model).tokens_per_layer < vtoken.stats(model).tokens_in
    assert (blind == batch.labels)[batch.labels != -100].float().mean() > 0.6
    part = "gate" if preset == "dyvte-mini" else "scorer"
    assert vtoken.mini.learned("mini-llava", part).stat().st_size < 200_000
    assert checkpoints.load("mini-llava", part).metadata["model"] == "mini-llava"


def test_the_divergence_that_the_fixed_exit_is_calibrated_with():
    """Against stock runs in which the layers behind the exit cannot see the picture."""
    model, inputs = tiny.make("llava", (1, 1))
    found = exit_divergence(model, inputs)
    assert found.shape == (2, 4)
    assert found[:, 0].isinf().all()
    with torch.no_grad():
        full = model(**inputs).logits[:, -1].log_softmax(1)
        with vtoken.reduce(model, vtoken.VTW(2), backend="mask"):
            blind = model(**inputs).logits[:, -1].log_softmax(1)
    wanted = (full.exp() * (full - blind)).sum(1)
    torch.testing.assert_close(found[:, 2], wanted, atol=1e-5, rtol=1e-3)
