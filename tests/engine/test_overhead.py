# SPDX-License-Identifier: Apache-2.0
"""What a wrapped model costs beside the kernels it needs: decode steps without waiting, memory in proportion."""

from __future__ import annotations

import threading
import weakref
from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtoken
from vtoken.encoder import STATISTICS

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")
REDUCERS = {
    "keep all": vtoken.Random(keep=1.0),
    "before": vtoken.Random(keep=0.25),
    "inside": vtoken.FastV(keep=0.25, layer=2),
    "several layers": vtoken.PyramidDrop(keep=0.25),
    "tower": vtoken.Chain([vtoken.TowerPrune(keep=0.5, block=1), vtoken.Random(keep=0.25)]),
}
every_reducer = pytest.mark.parametrize("name", REDUCERS)


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Bytes(TorchDispatchMode):
    """The peak of what storages that operators made held at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.known | given:  # neither seen before nor a view
                self._follow(storage)
        return out

    def _follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)  # a storage has one Python object for as long as it lives


def decode_step(model, inputs, with_mask):
    """Operators of the second decode step."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        mask, place = inputs["attention_mask"], inputs["attention_mask"].sum(1, keepdim=True)
        for _ in range(2):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            call = {
                "input_ids": out.logits[:, -1:].argmax(-1),
                "position_ids": place,
                "attention_mask": mask if with_mask else None,
                "past_key_values": out.past_key_values,
                "use_cache": True,
            }
            with Calls() as calls:
                out = model(**call)
            place = place + 1
    return calls.count


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(("batch", "with_mask"), [((1,), False), ((1,), True), ((1, 2), True)])
@every_reducer
def test_a_decode_step_waits_for_the_device_no_more_often_than_unwrapped(name, batch, with_mask, attn):
    model, inputs = tiny.make("llava", batch, attn=attn)
    plain = decode_step(model, inputs, with_mask)
    with vtoken.reduce(model, REDUCERS[name]):
        found = decode_step(model, inputs, with_mask)
    assert {op: found[op] for op in WAITING} == {op: plain[op] for op in WAITING}
    compute = ("mm", "addmm", "bmm", "silu", "_softmax", "_scaled_dot_product_flash_attention_for_cpu")
    assert {op: found[op] for op in compute} == {op: plain[op] for op in compute}
    if name == "keep all":
        assert found == plain


def test_a_decode_step_of_a_full_batch_without_mask_adds_no_operator():
    model, inputs = tiny.make("llava", (1,))
    plain = decode_step(model, inputs, False)
    with vtoken.reduce(model, REDUCERS["before"]):
        added = decode_step(model, inputs, False) - plain
    assert set(added) <= {"alias"}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bare", [False, True], ids=["mask of ones", "no mask"])
@every_reducer
def test_a_prefill_without_padding_stays_on_the_causal_kernel(name, rows, bare, monkeypatch):
    """No (S, S) mask is built where ``is_causal`` says the same, before and behind a cut inside of the decoder."""
    model, inputs = tiny.make("llava", (1,))
    inputs = {key: torch.cat([value] * rows) for key, value in inputs.items()}  # rows of one length
    inputs = {**inputs, "attention_mask": None} if bare else inputs
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        seen.append((query.shape[2], attn_mask, kwargs.get("is_causal")))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad(), vtoken.reduce(model, REDUCERS[name]):
        model(**inputs, use_cache=True)
        text = inputs["input_ids"].shape[1] - 16
        lengths = [text + sum(kept) // rows for _, kept in vtoken.stats(model).layers]
    decoder = seen[-4:]
    assert [(mask, causal) for _, mask, causal in decoder] == [(None, True)] * 4
    assert list(dict.fromkeys(length for length, _, _ in decoder)) == list(dict.fromkeys(lengths))


@pytest.mark.parametrize(("name", "most", "waits"), [("keep all", 20, 1), ("before", 200, 10)])
def test_a_prefill_adds_few_operators_and_waits_seldom(name, most, waits):
    """Where a prefill takes milliseconds, two hundred launches are a tenth of it."""
    model, inputs = tiny.make("llava", (1, 2))
    with torch.no_grad():
        model(**inputs)
        with Calls() as plain:
            model(**inputs)
        with vtoken.reduce(model, REDUCERS[name]):
            model(**inputs)
            with Calls() as found:
                model(**inputs)
    added = found.count - plain.count
    assert added.total() <= most
    assert sum(added[op] for op in WAITING) <= waits


def test_statistics_of_a_prefill_that_keeps_all_hold_no_states():
    model, inputs = tiny.make("llava", (1, 2))
    embeds = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(weakref.ref(kwargs["inputs_embeds"])), with_kwargs=True
    )
    with vtoken.reduce(model, REDUCERS["keep all"]):
        model(**inputs)
        assert embeds[-1]() is None
        found = vtoken.stats(model)
    handle.remove()
    assert [(one.row, one.tokens, one.kept, one.kept_last) for one in found.images] == [
        (0, 16, 16, 16),
        (1, 16, 16, 16),
        (1, 16, 16, 16),
    ]
    assert found.tokens_per_layer == found.tokens_in == 48


def test_another_thread_is_refused_while_one_is_inside():
    """The check costs nothing in the common case, and still is one."""
    model, inputs = tiny.make("llava", (1,))
    found = []

    def intrude(*_):
        def run():
            try:
                model(**inputs)
            except RuntimeError as error:
                found.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with vtoken.reduce(model, REDUCERS["before"]):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(intrude)
        model(**inputs)
        handle.remove()
        model(**inputs)
    assert len(found) == 1
    assert "Two threads" in found[0]


def cache_columns(cache):
    """Bytes that the cache's storages hold, and columns of each layer."""
    tensors = [(layer.keys, layer.values) for layer in cache.layers]
    size = sum(x.untyped_storage().nbytes() for pair in tensors for x in pair)
    return size, [keys.shape[2] for keys, _ in tensors]


@every_reducer
def test_the_cache_is_physically_smaller(name):
    model, inputs = tiny.make("llava", (1,))
    with torch.no_grad():
        full, columns = cache_columns(model(**inputs, use_cache=True).past_key_values)
        length = columns[0]
        with vtoken.reduce(model, REDUCERS[name]):
            stored, columns = cache_columns(model(**inputs, use_cache=True).past_key_values)
            kept = dict(vtoken.stats(model).layers)
    expected, now = [], 16
    for layer in range(4):
        now = kept[layer][0] if layer in kept else now
        expected.append(length - 16 + now)
    assert columns == expected
    assert stored == full * sum(columns) // (4 * length), "no view of a longer tensor"


def test_peak_memory_of_a_prefill_follows_the_rows_that_are_left():
    """Activations of a decoder that dominates: at an eighth of the tokens, well under half of the peak."""
    model, inputs = tiny.make("llava", (1,))
    prompt = {**inputs}
    prompt["pixel_values"] = inputs["pixel_values"].expand(24, -1, -1, -1)
    ids = torch.full((1, 24 * 16 + 24), 5)
    ids[0, torch.arange(24 * 17) % 17 > 0] = tiny.IMAGE_ID
    prompt |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def peak():
        watch = []

        def start(*_):
            watch.append(Bytes().__enter__())

        def stop(*_):
            watch[-1].__exit__(None, None, None)

        layers = model.model.language_model.layers
        handles = [layers[0].register_forward_pre_hook(start), layers[-1].register_forward_hook(stop)]
        with torch.no_grad():
            model(**prompt, use_cache=True, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return watch[-1].peak

    whole = peak()
    with vtoken.reduce(model, vtoken.Random(keep=0.125)):
        pruned = peak()
    rows, left = 24 * 17, 24 * 3
    assert pruned < 1.3 * whole * left / rows


@pytest.mark.parametrize(
    ("what", "shape"),
    [
        pytest.param("received", (1, 1, 16384, 4), id="long"),
        pytest.param("given", (2, 16, 1024, 4), id="many heads"),
        pytest.param("received", (2, 16, 1024, 4), id="many heads"),
        pytest.param("received", (640, 4, 64, 4), id="windows"),
    ],
)
def test_attention_of_all_patches_is_streamed(what, shape):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(shape, generator=generator) for _ in range(2))
    with Bytes() as watch:
        found = STATISTICS[what](query, key, 0.5, int(what == "given"))
    assert 16 << 20 < watch.peak < 64 << 20
    some = slice(0, 2)
    rows = (query[some, :, ::127] @ key[some].mT * 0.5).softmax(-1)
    if what == "given":  # to patches, and not to the first token, [CLS]
        torch.testing.assert_close(found[some, ::127], rows[..., 1:].mean(-1).mean(1), atol=1e-8, rtol=1e-4)
    elif shape[2] <= 1024:
        full = (query[some] @ key[some].mT * 0.5).softmax(-1)
        torch.testing.assert_close(found[some], full.mean((1, 2)), atol=1e-8, rtol=1e-4)
    else:
        assert abs(float(found.sum()) - 1) < 1e-4
        rough = rows.mean((1, 2))
        assert float(torch.corrcoef(torch.stack([found[0], rough[0]]))[0, 1]) > 0.5, "every 127th row estimates it"


@pytest.mark.parametrize("what", STATISTICS)
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_of_any_size_give_the_full_matrix(what, first, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(3, 5, 23, 8, generator=generator) for _ in range(2))
    logits = query.double() @ key.double().mT * 0.3
    rows = logits.softmax(-1)
    wanted = {
        "cls": rows[:, :, 0].mean(1),
        "cls_logits": logits[:, :, 0].mean(1),
        "received": rows[:, :, first:].mean((1, 2)),
        "given": rows[..., first:].mean(-1).mean(1),
        "keys": key.mean(1).double(),
    }[what]
    for block in (1, 23, 100, 23 * 23, 3 * 23 * 23, 1 << 20):
        monkeypatch.setattr("vtoken.encoder.BLOCK", block)
        found = STATISTICS[what](query, key, 0.3, first)
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
