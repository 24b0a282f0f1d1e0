# SPDX-License-Identifier: Apache-2.0
"""Several reducers, one after the other."""

from __future__ import annotations

import pytest
import torch

import vtoken

from .contexts import DEPTH, RAGGED, Row, make_context, run


def test_each_stage_chooses_from_what_the_former_kept():
    first, second = vtoken.IDPruner(keep=0.5), vtoken.DivPrune(keep=0.25)
    ctx = make_context(*RAGGED)
    chain = vtoken.Chain([first, second]).before_llm(ctx)
    one = first.before_llm(ctx)
    two = second.before_llm(ctx.after(one))
    assert torch.equal(chain.keep, two.keep)
    assert not (chain.keep & ~one.keep).any()
    assert chain.keep.sum(1).tolist() == ctx.budget(0.25).tolist()
    assert chain.features is None


def test_a_selection_after_a_merge_hands_the_features_on():
    ctx = make_context(*RAGGED)
    merge, select = vtoken.Pooled(keep=0.5), vtoken.DivPrune(keep=0.25)
    cut = vtoken.Chain([merge, select]).before_llm(ctx)
    pooled = merge.before_llm(ctx)
    torch.testing.assert_close(cut.features[cut.keep], pooled.features[cut.keep])
    assert torch.equal(cut.sizes[cut.keep], pooled.sizes[cut.keep])
    gone = ~cut.keep.gather(1, pooled.source.clamp(min=0))
    assert torch.equal(cut.source, pooled.source.masked_fill(gone, -1))


def test_a_merge_after_a_merge_weighs_by_size():
    ctx = make_context(Row(("grid",), 1))
    cut = vtoken.Chain([vtoken.Pooled(keep=18), vtoken.Pooled(keep=1)]).before_llm(ctx)
    torch.testing.assert_close(cut.features[0][cut.keep[0]][0], ctx.features[0].mean(0))
    assert cut.sizes[0][cut.keep[0]].tolist() == [36.0]


def test_stages_inside_follow_those_before():
    chain = vtoken.Chain([vtoken.IDPruner(keep=0.5), vtoken.FastV(keep=0.25, layer=2), vtoken.VTW(layer=5)])
    ctx = make_context(*RAGGED)
    counts = [step.valid.sum(1).tolist() for step in run(chain, ctx)]
    assert counts[1] == ctx.budget(0.5).tolist()
    assert counts[2] == ctx.budget(0.25).tolist()
    assert counts[3] == [0] * ctx.items
    assert chain.layers(DEPTH) == (2, 5)
    assert chain.taps(DEPTH) == {1: "last"}
    assert chain.stages == ("before_llm", "in_llm")


def test_two_stages_at_one_layer_act_in_order():
    chain = vtoken.Chain([vtoken.DART(keep=0.5, layer=3), vtoken.FastV(keep=0.25, layer=3)])
    ctx = make_context(*RAGGED)
    assert run(chain, ctx)[-1].valid.sum(1).tolist() == ctx.budget(0.25).tolist()


def test_identities_inside_a_chain_do_nothing():
    chain = vtoken.Chain([vtoken.FastV(keep=1.0), vtoken.VTW()])
    assert chain.layers(DEPTH) == vtoken.VTW().layers(DEPTH)
    assert vtoken.Chain([vtoken.IDPruner(keep=1.0)]).is_identity
    assert not chain.is_identity


def test_newlines_projector_and_reads_are_those_of_its_stages():
    chain = vtoken.Chain([vtoken.FoPru(keep=0.5), vtoken.ZOOPrune(keep=0.25)])
    assert chain.newlines == "keep"
    assert chain.positions == "compact"
    assert chain.needs_projector
    assert chain.encoder_reads() == vtoken.FoPru().encoder_reads()
    mixed = vtoken.Chain([vtoken.FoPru(keep=0.5), vtoken.DivPrune(keep=0.25)])
    assert mixed.newlines == "drop"
    ctx = make_context(Row(("anyres",), 3), newlines="keep")
    cut = chain.before_llm(ctx)
    assert cut.keep[0][ctx.layouts[0].newline].all()


def test_configuration_and_text():
    chain = vtoken.Chain([vtoken.IDPruner(keep=0.5), vtoken.DyVTE(min_layer=0.5)])
    assert vtoken.get_reducer(chain.config()) == chain
    assert str(chain).startswith("idpruner,keep=0.5")
    assert " > dyvte" in str(chain)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: vtoken.Chain([]), "at least one stage"),
        (lambda: vtoken.Chain(vtoken.VTW()), "is no list"),
        (lambda: vtoken.Chain(["todre"]), "Chain stage 'todre' is no reducer"),
        (lambda: vtoken.Chain([vtoken.FastV(), vtoken.ToDRE()]), "'todre' acts before the language model"),
        (
            lambda: vtoken.Chain([vtoken.Random(), vtoken.ToDRE(keep=0.5)]),
            "'todre' with keep=0.5 does nothing",
        ),
        (
            lambda: vtoken.Chain([vtoken.FastV(layer=4), vtoken.DyVTE(checks=(3,), min_layer=2)]).taps(8),
            "'fastv' reads the 'last' attention rows of layer 3 and 'dyvte' the 'question' rows",
        ),
    ],
)
def test_what_makes_no_sense_is_a_sentence(build, words):
    with pytest.raises(ValueError, match=words):
        build()
