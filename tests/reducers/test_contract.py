# SPDX-License-Identifier: Apache-2.0
"""What every registered reducer promises, on hand-made contexts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch

import vtoken
from vtoken.reducers.base import KeepReducer, MergeReducer
from vtoken.registry import reducer_class

from .contexts import DEPTH, RAGGED, Row, Tower, make_context, run

IN_THE_TOWER = {
    "tower-prune",
    "pixelprune",
    "ipcv",
    "downsample",
}  # need a vision tower, which a context is not: tests/engine has them
NAMES = [name for name in vtoken.list_reducers() if name not in IN_THE_TOWER]
every_reducer = pytest.mark.parametrize("name", NAMES)
BUDGETED = [name for name in NAMES if issubclass(reducer_class(name), KeepReducer)]


def build(name: str, keep: float | int = 0.25) -> vtoken.Reducer:
    return vtoken.get_reducer(name, keep=keep) if name in BUDGETED else vtoken.get_reducer(name)


def context(reducer: vtoken.Reducer, *rows: Row, **options):
    return make_context(*(rows or RAGGED), newlines=reducer.newlines, **options)


def expected(reducer: vtoken.Reducer, ctx, keep) -> list[int]:
    out = []
    for layout in ctx.layouts:
        tokens, newlines = len(layout.view), int(layout.newline.sum())
        extra = newlines if reducer.newlines == "keep" else 0
        tokens -= extra
        out.append(min(max(1, keep if isinstance(keep, int) else round(tokens * keep)), tokens) + extra)
    return out


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.1, 0.02, 5, 1, 1000])
@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_exact_for_every_image(name, keep):
    reducer = build(name, keep)
    steps = run(reducer, context(reducer))
    after = steps[1] if "before_llm" in reducer.stages else steps[-1]
    assert after.valid.sum(1).tolist() == expected(reducer, after, keep)


@every_reducer
def test_counts_never_grow(name):
    reducer = build(name)
    counts = [ctx.valid.sum(1) for ctx in run(reducer, context(reducer))]
    for before, after in itertools.pairwise(counts):
        assert (after <= before).all()


@every_reducer
def test_text_stays(name):
    reducer = build(name)
    steps = run(reducer, context(reducer))
    assert all(torch.equal(ctx.text, steps[0].text) for ctx in steps)
    assert all(torch.equal(ctx.hidden[ctx.text], steps[0].hidden[ctx.text]) for ctx in steps)


@every_reducer
def test_a_batch_gives_each_row_what_it_gives_alone(name):
    reducer = build(name)
    together = run(reducer, context(reducer))[-1]
    start = 0
    for row in RAGGED:
        if not row.images:
            continue
        alone = run(reducer, context(reducer, row))[-1]
        tokens = alone.longest
        mine = slice(start, start + len(row.images))
        assert torch.equal(together.valid[mine, :tokens], alone.valid)
        torch.testing.assert_close(together.features[mine, :tokens], alone.features, atol=1e-5, rtol=1e-5)
        start += len(row.images)


@every_reducer
def test_it_reads_only_what_it_declares(name):
    reducer = build(name)
    ctx = context(reducer)
    ctx = replace(ctx, encoder={read: ctx.encoder[read] for read in reducer.encoder_reads()})
    run(reducer, ctx)


@every_reducer
def test_the_choice_is_deterministic(name):
    reducer = build(name)
    one, two = (run(reducer, context(reducer))[-1] for _ in range(2))
    assert torch.equal(one.valid, two.valid)
    assert torch.equal(one.features, two.features)


@pytest.mark.parametrize("name", BUDGETED)
def test_identical_tokens_meet_the_budget(name):
    reducer = build(name, 0.3)
    steps = run(reducer, context(reducer, same=True))
    after = steps[1] if "before_llm" in reducer.stages else steps[-1]
    assert after.valid.sum(1).tolist() == expected(reducer, after, 0.3)


@pytest.mark.parametrize("name", BUDGETED)
def test_an_image_of_one_token_stays(name):
    reducer = build(name, 0.01)
    ctx = context(reducer, Row(("one",), 8))
    after = run(reducer, ctx)[1] if "before_llm" in reducer.stages else run(reducer, ctx)[-1]
    assert after.valid.sum(1).tolist() == [1]


@every_reducer
def test_a_tower_without_cls_is_served_or_refused_with_a_sentence(name):
    reducer = build(name)
    try:
        run(reducer, context(reducer, has_cls=False))
    except ValueError as error:
        assert "[CLS]" in str(error)  # noqa: PT017
        assert name == "globalcom2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_reducer
def test_half_precision_is_served(name, dtype):
    reducer = build(name)
    after = run(reducer, context(reducer, dtype=dtype))[-1]
    assert after.hidden.dtype == dtype


BLIND = {"random", "uniform", "vtw", "dyvte", "ima", "yopo"}  # choose without looking, or only leave when told to


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BLIND])
def test_features_that_are_not_finite_are_named(name):
    reducer = build(name)
    ctx = context(reducer)
    ctx = replace(ctx, hidden=ctx.hidden.masked_fill(ctx.visual[..., None], float("nan")))
    ctx = replace(ctx, projector_input=torch.full_like(ctx.projector_input, float("nan")))
    ctx = replace(
        ctx, encoder={read: torch.full_like(ctx.encoder[read], float("nan")) for read in reducer.encoder_reads()}
    )
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        run(reducer, ctx)


@every_reducer
def test_a_ratio_of_one_is_the_identity(name):
    if name in BUDGETED:
        assert build(name, 1.0).is_identity
        assert not build(name, 1).is_identity


@every_reducer
def test_the_configuration_builds_the_same_reducer(name):
    reducer = build(name)
    assert vtoken.get_reducer(reducer.config()) == reducer
    assert reducer.config()["reducer"] == name
    assert hash(reducer) == hash(vtoken.get_reducer(reducer.config()))


@every_reducer
def test_it_says_what_it_is(name):
    cls = reducer_class(name)
    assert cls.summary.endswith(".")
    assert cls.name == name
    assert cls.newlines in ("keep", "drop")
    assert cls.uses_text in (True, False)
    assert cls.positions in ("keep", "compact")
    assert cls.paper == "" or cls.paper in cls.__doc__
    assert getattr(vtoken, cls.__name__) is cls
    assert build(name).stages


@every_reducer
def test_layers_exist_at_any_depth(name):
    reducer = build(name)
    for depth in (4, 6, 28, 32, 80):
        layers, taps = reducer.layers(depth), reducer.taps(depth)
        assert all(0 <= layer < depth for layer in layers)
        assert all(0 <= layer < depth and layer + 1 in layers for layer in taps)


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(reducer_class(name), MergeReducer)])
def test_merging_counts_every_patch(name):
    reducer = build(name)
    ctx = context(reducer)
    cut = reducer.before_llm(ctx)
    dropped = ctx.valid & (cut.source < 0)
    assert torch.equal(cut.sizes.sum(1).long(), (ctx.valid & ~dropped).sum(1))
    assert (cut.sizes[cut.keep] >= 1).all()
    assert not cut.sizes[~cut.keep].any()


WRONG = [
    ("fopru", {"strategy": "column"}, r"strategy='column': choose one of \['rank', 'row'\]"),
    ("todre", {"variant": "min"}, r"variant='min': choose one of \['max_sum', 'k_center'\]"),
    ("todre", {"tau": 2}, r"tau=2: give a number in \[0, 1\]"),
    ("idpruner", {"lam": 1.5}, r"lam=1.5: give a number in \[0, 1\]"),
    ("idpruner", {"lam": "high"}, r"lam='high'"),
    ("idpruner", {"parallel": 0}, "parallel=0: give an int of at least 1"),
    ("zooprune", {"directions": 0}, "directions=0"),
    ("zooprune", {"step": 0}, "step=0: give a number above 0"),
    ("globalcom2", {"scores": "sum"}, r"choose one of \['cls', 'features'\]"),
    ("globalcom2", {"temperature": -1}, "temperature=-1: give a number above 0"),
    ("dyvte", {"exit": "always"}, "exit='always': choose one of"),
    ("dyvte", {"exit": "gate"}, "a checkpoint goes with exit='gate'"),
    ("dyvte", {"min_layer": 1.5}, "min_layer=1.5 is no decoder layer"),
    ("dyvte", {"checks": []}, r"checks=\[\]: give a list"),
    ("aim", {"first": 0.8, "last": 0.5}, "first=0.8 must come before last=0.5"),
    ("fastv", {"layer": 0}, "layer=0 is no decoder layer"),
    ("pyramiddrop", {"at": 3}, "at=3: give a list of decoder layers"),
    ("sparsevlm", {"heads": 0}, "heads=0"),
    ("sparsevlm", {"recycle": "no"}, "recycle='no': give true or false"),
    ("visionzip", {"contextual": 2}, r"contextual=2: give a number in \[0, 1\]"),
    ("cdpruner", {"relevance": "clip"}, "relevance='clip'"),
    ("hiprune", {"object_layer": 1.5}, "object_layer=1.5"),
    ("scope", {"alpha": -1}, "alpha=-1: give a number of at least 0"),
    ("holov", {"segments": 0}, "segments=0"),
    ("vtw", {"layer": -3}, "layer=-3"),
    ("dart", {"pivots": 0}, "pivots=0"),
    ("dart", {"norm": "values"}, r"norm='values': choose one of \['keys', 'keys_l1', 'states'\]"),
    ("tokencorr", {"limit": 2}, "limit=2"),
    ("mmtok", {"tau_t": 0}, "tau_t=0: give a number above 0"),
    ("mmtok", {"visual": "patches"}, r"visual='patches': choose one of \['tower', 'projected'\]"),
    ("otprune", {"gamma": 0}, "gamma=0: give a number above 0"),
    ("apet", {"basis": 0}, "basis=0: give an int of at least 1"),
    ("apet", {"compat": 1}, "compat=1: give true or false"),
    ("prunesid", {"visual": "keys"}, r"visual='keys': choose one of \['tower', 'projected'\]"),
    ("random", {"seed": -1}, "seed=-1"),
    ("random", {"layer": 0}, "layer=0 is no decoder layer"),
    ("uniform", {"layer": 1.5}, "layer=1.5 is no decoder layer"),
    ("v2drop", {"at": [0, 3]}, "at=0 is no decoder layer"),
    ("v2drop", {"last": 0}, "last=0 is no decoder layer"),
    ("random", {"keep": 0}, "keep=0"),
    ("uniform", {"keep": 1.5}, r"keep=1.5 is not a ratio"),
]


@pytest.mark.parametrize(("name", "params", "words"), WRONG)
def test_a_wrong_option_is_a_sentence(name, params, words):
    with pytest.raises(ValueError, match=words):
        vtoken.get_reducer(name, **params)


def test_every_choice_is_named():
    """A string option is checked against its choices."""
    for name in NAMES:
        for field in dataclasses.fields(reducer_class(name)):
            if isinstance(field.default, str):
                with pytest.raises(ValueError, match="choose one of"):
                    vtoken.get_reducer(name, **{field.name: "no such thing"})


@pytest.mark.parametrize("preset", vtoken.list_presets())
def test_presets_build(preset):
    reducer = vtoken.get_reducer(preset)
    assert reducer.stages
    assert vtoken.get_reducer(reducer.config()) == reducer


# for a decoder of 32 layers, or for one model
@pytest.mark.parametrize("preset", [p for p in vtoken.list_presets() if not p.endswith(("-32", "-mini", "vtw-15"))])
def test_presets_run(preset):
    reducer = vtoken.get_reducer(preset)
    after = run(reducer, context(reducer))[-1]
    assert (after.valid.sum(1) <= after.tokens).all()


def test_the_helper_tower_is_the_same_alone():
    layout = make_context(Row(("grid",), 1)).layouts[0]
    read = vtoken.EncoderRead("cls")
    assert torch.equal(Tower([(5, layout)], True)[read][0], Tower([(4, layout), (5, layout)], True)[read][1])
    assert make_context(Row(("grid",), 1)).depth == DEPTH


@pytest.mark.parametrize("name", [name for name in NAMES if not reducer_class(name).uses_text])
def test_a_choice_that_does_not_use_the_text_does_not_depend_on_it(name):
    reducer = build(name)
    ctx, other = context(reducer), context(reducer)
    other = replace(other, hidden=torch.where(other.text[..., None], other.hidden.flip(2) * 3, other.hidden))
    assert torch.equal(run(reducer, ctx)[-1].valid, run(reducer, other)[-1].valid)
