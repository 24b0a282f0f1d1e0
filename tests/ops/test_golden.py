# SPDX-License-Identifier: Apache-2.0
"""Published algorithms on stored input: index sets equal, floats within the stated tolerance.

`CHECKS` holds one function a method. It is given the inputs of a case and an `Expected`, from which it takes every
array; what nobody took is an error, and so is a file of a method without a check.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vtoken import ops
from vtoken.adapters.qwen_vl import QwenVLAdapter
from vtoken.context import Attention, ItemLayout
from vtoken.encoder import STATISTICS
from vtoken.reducers.aim import importance
from vtoken.reducers.apet import plan
from vtoken.reducers.cdpruner import mean_cosine, rescaled
from vtoken.reducers.fopru import by_row, significance
from vtoken.reducers.globalcom2 import crop_ratios, crop_scores
from vtoken.reducers.hiprune import anchors_first, raster_neighbours
from vtoken.reducers.holov import segment_budget, segment_of
from vtoken.reducers.ipcv import change, changed_most, rebuilt_from
from vtoken.reducers.mmtok import cover_both
from vtoken.reducers.otprune import unit_channels
from vtoken.reducers.pixelprune import predicted
from vtoken.reducers.prumerge import every, gather_similar, outliers
from vtoken.reducers.prunesid import choose
from vtoken.reducers.rows import mean_over_rows, text_to_visual
from vtoken.reducers.sparsevlm import pool_size, relevant, strongest_heads
from vtoken.reducers.v2drop import variation
from vtoken.reducers.visionzip import join, spaced, with_mean_added
from vtoken.reducers.vispruner import thin
from vtoken.reducers.zooprune import sensitivity

FOLDER = Path(__file__).parents[1] / "golden"
CHECKS: dict[str, Callable] = {}


class Expected:
    """The expected arrays of a case; each must be taken once."""

    def __init__(self, arrays: dict[str, np.ndarray], tolerance: dict) -> None:
        self.arrays, self.tolerance = arrays, tolerance

    def take(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays.pop(name))

    def close(self, name: str, found: Tensor) -> None:
        tolerance = self.tolerance.get("float_by_name", {}).get(name, self.tolerance["float_default"])
        torch.testing.assert_close(found.double(), self.take(name).double(), **tolerance)

    def same(self, name: str, found: Tensor) -> None:
        assert torch.equal(self.take(name), found.cpu()), name

    def order(self, name: str, found: Tensor) -> None:
        """``name`` in pick order and, where stored, the same ascending under the name of the kept set."""
        self.same(name, found)
        keep = name.replace("order", "keep")
        if keep != name and keep in self.arrays:
            self.same(keep, found.sort(-1).values)


def check(function: Callable) -> Callable:
    CHECKS[function.__name__] = function
    return function


def stems() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


def test_every_file_has_a_check():
    files = {path.name for path in FOLDER.iterdir()} - {"MANIFEST.json"}
    assert files == {stem + suffix for stem in stems() for suffix in (".npz", ".json")}
    assert {stem.rsplit("_s", 1)[0] for stem in stems()} == set(CHECKS)


def test_files_are_intact():
    import hashlib

    manifest = json.loads((FOLDER / "MANIFEST.json").read_text())
    text = json.dumps(manifest)
    for path in FOLDER.glob("*.npz"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text, path.name


@pytest.mark.parametrize("stem", stems())
def test_golden(stem: str):
    meta = json.loads((FOLDER / f"{stem}.json").read_text())
    arrays = np.load(FOLDER / f"{stem}.npz", allow_pickle=False)
    for case in meta["cases"]:
        given = {name: torch.from_numpy(arrays[key]) for name, key in case["inputs"].items()}
        expected = Expected({name: arrays[key] for name, key in case["expected"].items()}, meta["tolerance"])
        CHECKS[meta["method"]](case["params"], given, expected)
        assert not expected.arrays, f"{stem}: nothing compares {sorted(expected.arrays)}"


def everything(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------- selections
@check
def idpruner(p, x, e):
    k = max(1, round(len(x["x"]) * (1 - p["drop_ratio"])))
    found = ops.mmr(x["x"][None], x["scores"][None], k, p["mmr_lambda"], p["parallel_k"])
    e.order("order", found[0])


@check
def divprune(p, x, e):
    e.order("order", ops.max_min(x["x"][None], round(p["keep_ratio"] * len(x["x"])))[0])


@check
def cdpruner(p, x, e):
    text = x["text_embeds"][None].expand(len(x["image_embeds"]), -1, -1)
    # the authors' relevance is the negative cosine, scaled over all views at once
    cosine = -mean_cosine(x["image_embeds"], text, everything(text))
    relevance = rescaled(cosine.view(1, -1), everything(cosine.view(1, -1))).view_as(cosine)
    e.close("relevance", relevance)
    e.order("order", ops.dpp(x["features"], relevance, p["T"]))


@check
def scope(p, x, e):
    combine = {"multi": "multiply", "add": "add"}[p["combine"]]
    e.order("order", ops.coverage(x["x"], x["attn"], p["k"], p["alpha"], combine=combine))


@check
def mmtok(p, x, e):
    valid = everything(x["x"][None])
    free = valid.clone()
    free[:, p.get("padding", [])] = False
    real = everything(x["text"][None])
    tokens = (x[name][None] for name in ("x", "tower", "text"))
    found = cover_both(*tokens, p["k"], valid, real, (p["tau_t"], p["tau_v"]), p["alpha"], free)
    e.order("order", found[0])


@check
def otprune(p, x, e):
    tokens = x["x"][None]
    k = max(1, round(p["retention"] * tokens.shape[1]))
    e.order("order", ops.log_det(unit_channels(tokens, everything(tokens)), k, 0.01)[0])


@check
def prunesid(p, x, e):
    groups = x["group"] if p["case"] == "select" else [None] * len(x["hidden"])
    found = [
        choose(hidden[1:], attn.sum(0), p["K"], p["K"] - 1, group)
        for hidden, attn, group in zip(x["hidden"], x["attn"], groups, strict=True)
    ]
    order, group, survivors, budget = (torch.stack(part) for part in zip(*found, strict=True))
    if p["case"] == "pca":
        e.same("group", group)
    e.same("survivors", survivors)
    e.same("budget", budget)
    e.order("order", order)


@check
def pixelprune(p, x, e):
    pixels = x["pixels"].view(1, *p["grid"], -1)
    tau, metric = (0.0, "max") if p["metric"] == "exact" else (p["tau"], p["metric"])
    source = predicted(pixels, tau, metric, p["anchored"])
    kept = source == torch.arange(len(source))
    e.same("mask", kept.view(*p["grid"]))
    e.same("keep", kept.nonzero()[:, 0])
    if "max_error" in e.arrays:
        e.close("max_error", (x["pixels"][source] - x["pixels"]).abs().max())


@check
def ipcv(p, x, e):
    states, count = x["cur"], int(len(x["cur"]) * (1 - p["reduction"]))
    e.close("score", change(states, x["prev"]))
    keep = changed_most(states, x["prev"], count)
    e.same("keep", keep)
    gone = torch.ones(len(states), dtype=torch.bool)
    gone[keep] = False
    e.same("removed", gone.nonzero()[:, 0])
    neighbours = rebuilt_from(states, keep, p["neighbours"])
    e.same("neighbours", keep[neighbours].sort(1).values)
    moved = x["final"][keep] - states[keep]
    e.close("rebuilt", states[gone] + ops.neighbours.neighbour_mean(moved, neighbours))
    size = p["grid"][0] * p["grid"][1]
    e.same("cu_seqlens_true", bounds_of_kept(torch.arange(p["frames"] + 1) * size, ~gone))
    # the reference counts the first patch of a later frame, where it is kept, with the frame before
    late = [int(bound in keep) for bound in range(size, p["frames"] * size, size)]
    wrong = bounds_of_kept(torch.arange(p["frames"] + 1) * size, ~gone) + torch.tensor([0, *late, 0])
    e.same("cu_seqlens", wrong)


def bounds_of_kept(bounds: Tensor, kept: Tensor) -> Tensor:
    """What the adapter of packed towers makes of the bounds of frames."""
    tables = (kept[:, None],)
    given = {"cu_seqlens": bounds, "position_embeddings": tables}
    return QwenVLAdapter.cut_block(None, (), given, kept)["cu_seqlens"]


@check
def todre(p, x, e):
    if p["case"] == "stage2":
        start, stop, length = p["bound"]
        attention = x["attn"][None]
        visual = torch.zeros(1, length, dtype=torch.bool)
        visual[:, start:stop] = True
        text = torch.ones(1, length - stop, dtype=torch.bool)
        e.close("alpha_tv", text_to_visual(Attention(attention[:, :, stop:], text), visual)[0])
        back = text_to_visual(Attention(attention[:, :, start:stop], visual[:, start:stop]), ~visual & text_mask(p))
        e.close("alpha_vt", back[0])
        both = text_to_visual(Attention(attention[:, :, stop:], text), visual)[0] < p["tau"]
        e.same("remove", both & (back[0] < p["tau"]))
        return
    low, high = p["pivot_range"]
    pivot = x["cls_attn"][low:high].argmax() + low
    e.same("pivot", pivot)
    for name, select in (("max_sum", ops.max_sum), ("k_center", ops.k_center)):
        e.order(f"order_{name}", select(x["x"][None], p["k"], start=pivot[None])[0])


def text_mask(p) -> Tensor:
    return (torch.arange(p["bound"][2]) >= p["bound"][1])[None]


@check
def zoo_prune(p, x, e):
    def project(values: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(values @ x["w1"].T + x["b1"])
        return hidden @ x["w2"].T + x["b2"]

    views = x["x"] if p["per_view"] else x["x"][None]
    sens = torch.stack([sensitivity(view, project, x["u"], p["h"]) for view in views])
    low, high = sens.amin(1, keepdim=True), sens.amax(1, keepdim=True)
    order = ops.sads(project(views), (sens - low) / (high - low + 1e-8), p["k"])
    e.close("sens", sens if p["per_view"] else sens[0])
    e.order("order", order if p["per_view"] else order[0])


@check
def fopru(p, x, e):
    first = int(p["has_cls"])
    read = [
        STATISTICS[what](x["q"][None], x["k"][None], x["q"].shape[-1] ** -0.5, first)[:, first:]
        for what in ("received", "given")
    ]
    sig = significance(*read, everything(read[0]))
    e.close("sig", sig[0])
    e.same("uses_columns", torch.tensor(torch.equal(sig, read[0])))
    e.same("keep_rank", ops.top_k(sig, max(1, int(sig.shape[1] * p["r"])))[0].sort().values)
    row = (torch.arange(sig.shape[1]) // p["grid_w"])[None]
    rows = max(1, int(p["grid_h"] * p["r"]))
    keep = ops.top_k(by_row(sig, row, everything(sig)), rows * p["grid_w"])[0].sort().values
    e.same("keep_row", keep)
    e.same("rows", (keep // p["grid_w"]).unique())


@check
def vispruner(p, x, e):
    scores = x["attn"].mean(1)
    head = int(p["T"] * p["important_ratio"])
    order = ops.top_k(scores, scores.shape[1])
    e.same("important_order", order[:, :head])
    target = torch.full((len(order),), p["T"] - head)
    rest = thin(x["features"], order[:, head:], target, everything(order))
    e.same("residual_order", rest)
    e.same("keep", torch.cat([order[:, :head], rest], 1).sort(1).values)


@check
def hiprune(p, x, e):
    if p["case"] == "llava":
        shallow, deep = (x[name].mean((1, 2))[:, 1:] for name in ("shallow_attn", "deep_attn"))
        e.close("shallow_colmean", shallow)
        e.close("deep_colmean", deep)
        k = int(p["T_total"] / len(shallow))
    else:
        shallow, deep, k = x["shallow"][None], x["deep"][None], p["K"]
    valid = everything(shallow)
    anchors = raster_neighbours(ops.top_k(shallow, round(k * p["alpha"] / 5)), valid, p["width"])
    keep = anchors_first(anchors, deep, torch.full((len(deep),), k), valid).sort(1).values
    if p["case"] == "llava":
        e.same("anchor_mask", anchors)
        e.same("keep", keep)
        return
    e.same("anchor_mask", anchors[0])
    e.same("keep_exclusive", keep[0])
    # the reference subtracts 1 from the score of an anchor, so that one with a score above 1 may be chosen twice
    rest = ops.top_k(deep - anchors.float(), k - int(anchors.sum()))
    e.same("keep", (anchors | ops.common.index_mask(rest, deep.shape[1]))[0].nonzero()[:, 0])


@check
def holov(p, x, e):
    attn = x["attn"][None]
    valid = everything(attn)
    segment = segment_of(valid, p["P"])
    member = segment[:, None] == torch.arange(p["P"])[:, None]
    counts = member.sum(2)
    mean = (attn[:, None] * member).sum(2) / counts
    ours = segment_budget(mean, counts, torch.tensor([p["T"]]))[0]
    theirs, emitted, keep = e.take("budget"), e.take("emitted"), e.take("keep")
    surplus = (theirs - counts[0]).clamp(min=0)
    assert int(surplus.sum()) == int((emitted < 0).sum())
    assert int(ours.sum()) == p["T"]
    assert bool((ours >= torch.minimum(theirs, counts[0])).all())  # the surplus goes to other segments
    if not bool(surplus.any()):
        assert torch.equal(ours, theirs)
    quota = torch.minimum(theirs, counts[0])
    picks = [ops.top_k(attn, int(quota[s]), member[:, s])[0] for s in range(p["P"])]
    full = theirs >= counts[0]
    picks = [pick.sort().values if full[s] else pick for s, pick in enumerate(picks)]
    assert torch.equal(torch.cat(picks), emitted[emitted >= 0])
    assert torch.equal(torch.cat(picks).sort().values, keep)


@check
def globalcom2(p, x, e):
    side, rows, columns = p["side"], p["grid_h"], p["grid_w"]
    scores, valid = x["cls_scores"], e.take("valid")
    thumb = ops.top_k(scores[:1], int(side * side * p["retention"]))[0]
    e.order("thumb_order", thumb)
    picture = scores[0].view(side, side)
    ratio = crop_ratios(picture, (rows, columns), p["retention"], p["temperature"])
    e.close("crop_ratio", ratio)
    count = (valid.sum(1) * ratio.double()).long()
    e.same("crop_k", count)
    local = torch.arange(side * side).expand(rows * columns, -1)
    view = torch.arange(rows * columns)[:, None].expand_as(local)
    here = valid.flatten()
    layout = ItemLayout(
        view=view.flatten()[here] + 1,
        row=(local // side).flatten()[here],
        column=(local % side).flatten()[here],
        grids=((side, side),) * (rows * columns + 1),
        thumbnail=0,
        crops=(rows, columns),
    )
    crop = view.flatten()[here]
    guided = crop_scores(picture, scores[1:].flatten()[here], crop, layout)
    keep = torch.cat([ops.top_k(guided[None], int(k), (crop == j)[None])[0] for j, k in enumerate(count)])
    tokens = local.flatten()[here] + crop * side * side
    keep = tokens[keep.sort().values]
    e.same("crop_keep", keep)
    e.same("packed_unpadded", packed(keep, valid, side, rows, columns))
    # the reference writes a token at its rank among the valid ones of its crop: the same set, one newline a full row
    theirs = e.take("packed_authors")
    assert torch.equal(theirs[theirs >= 0].sort().values, keep)
    assert int((theirs < 0).sum()) == rows * side


def packed(keep: Tensor, valid: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """Token ids row by row over the mosaic, a newline (-1) after each row that holds valid places."""
    ids = torch.arange(rows * columns * side * side).view(rows, columns, side, side)
    kept = torch.isin(ids, keep)
    ids, kept, real = (
        t.permute(0, 2, 1, 3).reshape(rows * side, columns * side) for t in (ids, kept, valid.view(ids.shape))
    )
    parts = [torch.cat([ids[r][kept[r]], torch.tensor([-1])]) for r in range(rows * side) if bool(real[r].any())]
    return torch.cat(parts)


# -------------------------------------------------------------------------------------------------------- merging
@check
def aim_merge(p, x, e):
    tokens = x["x"]
    metric = x.get("metric", tokens)
    features, source = tokens, torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
    weight = torch.ones(tokens.shape[:2])
    for number, r in enumerate(p["rounds"]):
        merged = ops.bipartite_merge(metric, features, r)
        metric = merged.features if "metric" not in x else ops.bipartite_merge(metric, metric, r).features
        features = merged.features
        weight = weight / ops.row_sizes(merged.source, features.shape[1]).gather(1, merged.source.gather(1, source))
        source = merged.source.gather(1, source)
        e.close(f"out_{number}", features)
    e.same("assign", source)
    e.close("weight", weight)


@check
def tome(p, x, e):
    features, sizes = x["x"], torch.ones(x["x"].shape[:2])
    source = torch.arange(features.shape[1]).expand(features.shape[:2])
    for number, r in enumerate(p["rounds"]):
        merged = ops.bipartite_merge(x[f"metric_{number}"], features, r, sizes, protect_first=p["class_token"])
        features = merged.features
        sizes = ops.row_sizes(merged.source, features.shape[1], sizes)
        source = merged.source.gather(1, source)
    e.close("x_out", features)
    e.close("size_out", sizes)
    e.same("assign", source)


@check
def apet(p, x, e):
    tokens = x["x"]
    quota, slots = torch.full((len(tokens),), p["K"]), torch.arange(tokens.shape[1])
    found = plan(tokens, quota, torch.tensor(p["start"]), everything(tokens), p["basis"], compat=True)
    keep = (found.source == slots).nonzero()[:, 1].view(len(tokens), -1)
    e.same("basis", found.basis)
    e.close("error", found.error)
    e.same("keep", keep)
    e.same("overwritten", (found.written >= 0).nonzero()[:, 1].view(len(tokens), -1))
    merged = ops.merge_rows(tokens, found.source, len(slots))
    written = tokens.gather(1, found.written.clamp(min=0)[..., None].expand_as(tokens))
    out = torch.where(found.written[..., None] >= 0, written, merged)
    e.close("tokens", out.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2])))


@check
def visionzip(p, x, e):
    scores, keys, hidden = x["cls_attn"].sum(1), x["metric"][:, 1:], x["hidden"][:, 1:]
    valid = everything(scores)
    dominant = ops.common.index_mask(ops.top_k(scores, p["dominant"]), scores.shape[1])
    targets = spaced(~dominant, torch.full((len(scores),), p["contextual"]))
    dominant_index, target_index = (mask.nonzero()[:, 1].view(len(mask), -1) for mask in (dominant, targets))
    stored = e.take("dominant")
    assert torch.equal(stored.sort(1).values, dominant_index)
    e.same("target", target_index)
    source = join(keys, dominant, targets, valid)
    number = torch.full_like(source, -1).scatter_(
        1, target_index, torch.arange(p["contextual"]).expand_as(target_index)
    )
    e.same("assign", number.gather(1, source).masked_fill(dominant, -1))
    rows = with_mean_added(hidden, source)
    merged = rows.gather(1, target_index[..., None].expand(-1, -1, rows.shape[2]))
    kept = hidden.gather(1, dominant_index[..., None].expand(-1, -1, rows.shape[2]))
    e.close("output", torch.cat([x["hidden"][:, :1], kept, merged], 1))


@check
def prumerge(p, x, e):
    query, key, hidden = (x[name] for name in ("q", "k", "hidden"))
    weight = (query[:1] @ key.T * query.shape[1] ** -0.5).softmax(1)[:, 1:]
    valid, tokens = everything(weight), weight.shape[1]
    ratio = float(outliers(weight, valid)) / tokens if p["adaptive"] else p["reduction_ratio"]
    e.close("ratio", torch.tensor(ratio, dtype=torch.double))
    index = ops.top_k(weight, int(tokens * ratio))
    if p["plus"]:
        chosen = ops.common.index_mask(index, tokens)
        more = every(torch.tensor([ratio]), valid) & ~chosen
        more[:, 575:] = False  # the reference stops one token early
        index = torch.cat([index, more.nonzero()[:, 1][None]], 1)
    e.same("order", index[0])
    e.same("keep", index[0].sort().values)
    rows, rest = gather_similar(hidden[None, 1:], weight, key[None, 1:], index, valid, 32)
    e.close("output", torch.cat([rows[0], rest]))


# ---------------------------------------------------------------------------------------- inside the language model
@check
def aim_importance(p, x, e):
    def rank(logits: Tensor, alive: Tensor) -> Tensor:
        seen = torch.ones(logits.shape[-2:]).tril().bool() & alive
        return ops.page_rank(logits.masked_fill(~seen, float("-inf")), p["tau"], p["iters"], p["d"])

    if p["case"] == "importance":
        e.close("importance", rank(x["logits"], x["alive"]))
        return
    start, stop, length = p["bound"]
    visual = (torch.arange(length) >= start) & (torch.arange(length) < stop)
    alive, dropped = visual | True, visual | True
    found, masks, row_masks = [], [], []
    for layer, rate in enumerate(p["rates"]):
        logits = x["q"][layer] @ x["k"][layer].mT / 4
        wanted = int((stop - start) * rate)
        found.append(rank(logits, alive))
        alive = ~visual | ops.common.index_mask(ops.top_k(found[-1][None], wanted, (alive & visual)[None]), length)[0]
        causal = logits.masked_fill(~(torch.ones(length, length).tril().bool() & dropped), float("-inf"))
        rows = Attention(causal.softmax(-1)[None][:, :, dropped], torch.ones(1, int(dropped.sum()), dtype=torch.bool))
        ours = importance(rows, dropped[None], p["tau"], p["iters"])
        dropped = ~visual | ops.common.index_mask(ops.top_k(ours, wanted, (dropped & visual)[None]), length)[0]
        masks.append(alive)
        row_masks.append(dropped)
    e.close("importance", torch.stack(found))
    e.same("keep_mask", torch.stack(masks))
    e.same("keep_mask_rowdrop", torch.stack(row_masks))
    e.same("n_visual", torch.stack([mask[visual].sum() for mask in masks]))


@check
def fastv(p, x, e):
    scores = x["attn_last"].mean(0)[None, p["v_start"] : p["v_start"] + p["n_vis"]]
    keep = ops.top_k(scores, round(p["n_vis"] * (1 - p["drop_ratio"])))[0].sort().values
    e.same("keep", keep)
    text = torch.ones(x["attn_last"].shape[1], dtype=torch.bool)
    text[p["v_start"] : p["v_start"] + p["n_vis"]] = False
    text[keep + p["v_start"]] = True
    e.same("position_ids", text.nonzero()[:, 0])


@check
def pyramiddrop(p, x, e):
    states, start = x["features"], p["v_start"]
    kept = torch.arange(p["n_vis"])
    for stage, ratio in enumerate(p["ratios"]):
        head = states.shape[1] // p["heads"]
        query, key = (
            rotated((states @ x[f"{name}_{stage}"].T).view(len(states), p["heads"], head), p["rope_base"])
            for name in ("wq", "wk")
        )
        attention = torch.einsum("hd,nhd->hn", query[-1], key).mul(head**-0.5).softmax(1).mean(0)
        scores = attention[start : start + len(kept)]
        e.close(f"attn_{stage}", scores)
        index = ops.top_k(scores[None], int(p["n_vis"] * ratio))[0].sort().values
        states = torch.cat([states[:start], states[start + index], states[start + len(kept) :]])
        kept = kept[index]
        e.same(f"keep_{stage}", kept)


@check
def v2drop(p, x, e):
    alive = torch.arange(len(x["cur_0"]))
    for stage, ratio in enumerate(p["ratios"]):
        scores = variation(*(x[f"{name}_{stage}"][None, alive] for name in ("cur", "prev")))
        e.close(f"score_{stage}", scores[0])
        alive = alive[ops.top_k(scores, max(1, int(len(alive) * ratio)))[0].sort().values]
        e.same(f"keep_{stage}", alive)


def rotated(x: Tensor, base: float) -> Tensor:
    half = x.shape[2] // 2
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angle)] * 2, 1)[:, None] for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], 2) * sin


@check
def sparsevlm(p, x, e):
    attention = x["attn_text_vis"][None]
    if p["case"] == "head_select":
        e.same("heads_order", strongest_heads(attention, p["n_heads"])[0])
        return
    start, stop, length = p["v_start"], p["v_start"] + p["n_vis"], len(x["embeds"])
    visual = (torch.arange(length) >= start) & (torch.arange(length) < stop)
    text = torch.ones(1, p["n_text"], dtype=torch.bool)
    chosen = relevant(x["embeds"][None], visual[None], x["embeds"][None, stop:], text)
    e.same("raters", chosen[0].nonzero()[:, 0])
    scores = mean_over_rows(Attention(attention, text), chosen)
    e.close("scores", scores[0])
    keep = ops.top_k(scores, min(p["k"], p["n_vis"] - 1))
    e.same("keep", keep[0].sort().values)
    rest = ~ops.common.index_mask(keep, p["n_vis"])
    pool = ops.top_k(scores, int(pool_size(rest.sum(1))), rest)
    e.same("pool_order", pool[0])
    states = x["hidden"][start:stop][pool]
    clusters = pool.shape[1] // 10 + 1
    e.same("centers", ops.density_peaks(states, clusters)[0])
    merged = ops.cluster_merge(states, clusters)
    e.same("assign", merged.source[0])
    e.close("merged", merged.features[0])
