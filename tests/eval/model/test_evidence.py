# SPDX-License-Identifier: Apache-2.0
"""Evidence recall: which tokens bear an answer, and how many of them a reducer left."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vtoken
from vtoken.eval.harness.driver import load_harness
from vtoken.eval.model.evidence import EvidenceReader, size_of
from vtoken.eval.model.loading import ModelSpec
from vtoken.mini.documents import held_out
from vtoken.mini.model import build_model, build_processor

SIDE, PATCH = 168, 14


@pytest.fixture(scope="module")
def model():
    return build_model().eval()


def inputs_of(*pictures):
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": "what is this ?"}]}]
        for p in pictures
    ]
    packing = {"processor_kwargs": {"padding": True, "return_tensors": "pt"}}
    return build_processor().apply_chat_template(
        talks, tokenize=True, return_dict=True, add_generation_prompt=True, **packing
    )


class Keep(vtoken.SelectReducer):
    """Keeps the slots it is given, whatever the budget."""

    slots = ()

    def select(self, ctx, budget):
        return torch.tensor(self.slots).expand(ctx.items, -1)


def recall(model, reducer, pictures, boxes):
    inputs = inputs_of(*pictures)
    with vtoken.reduce(model, reducer), torch.no_grad():
        model(**inputs)
        return EvidenceReader(model).recalls(inputs, [[p] for p in pictures], boxes, vtoken.stats(model))


def keep(*slots):
    reducer = Keep(keep=len(slots))
    object.__setattr__(reducer, "slots", slots)
    return reducer


def test_tokens_are_found_where_the_box_is(model):
    picture = Image.new("RGB", (SIDE, SIDE))
    box = [28, 14, 56, 28]  # exactly the patches (row 1, columns 2 and 3): slots 14 and 15 of a 12 x 12 grid
    assert recall(model, keep(14, 15), [picture], [[[box]]]) == [1.0]
    assert recall(model, keep(14, 100), [picture], [[[box]]]) == [0.5]
    assert recall(model, keep(0, 1, 13, 16, 26), [picture], [[[box]]]) == [0.0]


def test_a_box_smaller_than_a_patch_counts_and_a_touch_does_not(model):
    picture = Image.new("RGB", (SIDE, SIDE))
    assert recall(model, keep(0), [picture], [[[[4, 4, 8, 8]]]]) == [1.0]
    assert recall(model, keep(0), [picture], [[[[4, 4, 16, 12]]]]) == [1.0]  # reaches two pixels into slot 1
    assert recall(model, keep(0), [picture], [[[[0, 0, 22, 14]]]]) == [0.5]  # and here eight


def test_boxes_are_in_pixels_of_the_original_picture(model):
    wide = Image.new("RGB", (4 * SIDE, 2 * SIDE))  # the processor squeezes it into a square
    assert recall(model, keep(14), [wide], [[[[2 * 56, 28, 3 * 56, 56]]]]) == [1.0]


def test_rows_have_their_own_evidence_or_none(model):
    pictures = [Image.new("RGB", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE), "red")]
    assert recall(model, keep(0), pictures, [[[]], [[[0, 0, 14, 14]]]]) == [None, 1.0]


def test_tokens_that_leave_inside_the_decoder_count_for_the_layers_that_had_them(model):
    picture = Image.new("RGB", (SIDE, SIDE))
    (found,) = recall(model, vtoken.VTW(layer=2), [picture], [[[[0, 0, SIDE, SIDE]]]])
    assert found == pytest.approx(2 / 6)


def test_the_time_steps_of_a_clip_show_several_frames():
    places = vtoken.TokenMap(
        row=torch.zeros(4, dtype=torch.long),
        position=torch.arange(4),
        image=torch.zeros(4, dtype=torch.long),
        view=torch.tensor([0, 0, 1, 1]),
        box=torch.tensor([[0, 0, 8, 8], [8, 0, 16, 8]] * 2, dtype=torch.float),
        sizes=[(8, 16)],
        kept={},
        merged={},
    )
    reader = EvidenceReader(None)
    clip = np.zeros((4, 8, 16, 3), np.uint8)
    reader._maps[((1,), ((8, 16),))] = places
    boxes = [[], [], [], [[0, 0, 8, 8]]]  # only in the last of four frames: left token of the second step

    def of(*kept):
        stats = SimpleNamespace(kept=[(0, torch.tensor([kept]))], depth=3)
        return reader.recalls({}, [[clip]], [boxes], stats)

    assert size_of(clip) == (8, 16)
    assert of(False, False, True, False) == [1.0]
    assert of(True, True, False, True) == [0.0]


def test_every_sample_of_a_bundled_task_has_it(checkpoint, private_cache):
    load_harness()
    from vtoken.eval.harness.asked import question_of
    from vtoken.eval.harness.tasksource import load_task
    from vtoken.eval.model.loaded import LoadedModel

    model = LoadedModel(ModelSpec(str(checkpoint), device="cpu"))
    docs = held_out("attr", 3)
    task = load_task("mini_attr")
    requests = [
        SimpleNamespace(args=("", task.doc_to_messages, {"max_new_tokens": 2}, i, "mini_attr", "test"))
        for i in range(len(docs))
    ]
    questions = [question_of(request, {"mini_attr": task.dataset}) for request in requests]

    def recalls(reducer):
        return [answer.counts["evidence_recall"] for answer in model.answer(questions, reducer, batch_size=3)]

    assert recalls(None) == [1.0] * 3
    half = recalls(vtoken.get_reducer("random", keep=0.5))
    assert 0 < np.mean(half) < 1


def test_places_are_kept_for_a_few_sizes_only(monkeypatch):
    from vtoken.eval.model import evidence

    asked = []
    monkeypatch.setattr(evidence.vtoken, "token_map", lambda model, inputs, sizes: asked.append(sizes[0]) or sizes)
    reader = EvidenceReader(None)
    for side in (*range(1, evidence.REMEMBERED + 2), 2, 1):
        reader._map({}, [[Image.new("RGB", (side, side))]])
    assert len(reader._maps) == evidence.REMEMBERED
    assert asked == [(side, side) for side in (*range(1, evidence.REMEMBERED + 2), 1)]  # 2 was known, 1 no longer
