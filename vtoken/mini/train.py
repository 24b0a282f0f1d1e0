# SPDX-License-Identifier: Apache-2.0
"""Train the embedded LLaVA from scratch, in five phases.

1. ``decoder``: the Llama decoder learns to answer about *symbolic* pictures, whose visual tokens are sums of label
   embeddings. No pixels: it finds the hard part, binding question words to visual tokens, in minutes.
2. ``binding``: the same with the questions that need a colour and a shape at one place.
3. ``tower``: the CLIP tower learns what lies under each patch (dense labels) and, on [CLS], what the picture shows.
4. ``align``: the projector learns to turn the tower's features into the decoder's symbolic tokens.
5. ``joint``: everything together on pictures and questions, next-token loss plus the dense losses.

    python -m vtoken.mini.train all --out build/mini-llava
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vtoken.attention import attention_rows, tap
from vtoken.mini import batches
from vtoken.mini.labels import FIELDS, IGNORE, PICTURE_LABELS
from vtoken.mini.model import VOCAB, build_model, build_processor
from vtoken.mini.questions import KINDS
from vtoken.mini.world import COLORS, LETTERS, SHAPES

log = logging.getLogger("vtoken.mini")

WIDTH = 128
EASY_STEPS = 600  # with few shapes a scene: binding is found there first
HORIZON = 6000  # steps of the decoder's learning-rate schedule, of which each phase takes the beginning
GROUND_LAYER, GROUND_HEADS, RELATE_LAYER, GROUND_WEIGHT = 2, 2, 4, 0.1
HARD_KINDS = [*KINDS, "existence", "position", "relation", "count", "word"]  # asked twice as often
BINDING_KINDS = ["position", "relation", "position", "relation", "existence", "count", "word", "shape"]
NOUN_FIELDS = ("color", "shape", "row", "column")
FIELD_WEIGHTS = {"kind": 1.0, "row": 0.2, "column": 0.2}


class Symbols(nn.Module):
    """Label embeddings: the visual tokens of a picture whose content is known."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in FIELDS.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.1)

    def start_from_words(self, words: torch.Tensor) -> None:
        """Give a label the embedding of its word: question words and visual tokens then match from the start."""
        names = {"color": COLORS, "shape": SHAPES, "digit": "0123456789", "letter": [f"##{x}" for x in LETTERS]}
        with torch.no_grad():
            for field, labels in names.items():
                self.tables[field].weight.copy_(words[[VOCAB[label] for label in labels]])

    def forward(self, labels: dict[str, torch.Tensor], dropout: float = 0.0) -> torch.Tensor:
        """(B, N, WIDTH) sums over the fields that apply; ``dropout`` forgets single fields of single patches."""
        out = torch.zeros(*labels["kind"].shape, WIDTH)
        for name, table in self.tables.items():
            known = labels[name] != IGNORE
            if dropout:
                known = known & (torch.rand(known.shape) >= dropout)
            out = out + table(labels[name].clamp(min=0)) * known[..., None]
        return out


class Heads(nn.Module):
    """Linear classifiers of the dense labels and of the picture labels; they are not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in FIELDS.items()})
        self.picture = nn.ModuleList([nn.Linear(WIDTH, PICTURE_LABELS) for _ in range(2)])
        self.noun = nn.ModuleDict({name: nn.Linear(WIDTH, FIELDS[name]) for name in NOUN_FIELDS})

    def dense_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of every field over the patches to which it applies; ``features`` (B, N, WIDTH)."""
        total = features.new_zeros(())
        for name, head in self.patch.items():
            weight = 3.0 if name in ("letter", "digit", "shape", "index", "center") else 1.0
            logits = head(features).flatten(0, 1)
            loss = F.cross_entropy(logits, labels[name].flatten(), ignore_index=IGNORE)
            total = total + FIELD_WEIGHTS.get(name, weight) * loss
        return total

    def noun_loss(self, states: torch.Tensor, labels: dict[str, torch.Tensor], pack: batches.Pack) -> torch.Tensor:
        """Cross-entropy of what and where an item is, from the decoder's states (B, R, WIDTH) of its noun."""
        total = states.new_zeros(())
        for name, head in self.noun.items():
            target = labels[name].gather(1, pack.centers).masked_fill(pack.nouns < 0, IGNORE)
            total = total + F.cross_entropy(head(states).flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        return total

    def picture_loss(self, cls: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Multi-label loss of the [CLS] states (B, WIDTH) of the feature layer and of the last layer."""
        return sum(
            F.binary_cross_entropy_with_logits(head(state), target, pos_weight=torch.tensor(5.0))
            for head, state in zip(self.picture, cls, strict=True)
        )


def optimizer(parameters, lr: float) -> torch.optim.AdamW:
    params = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.02},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


class Schedule:
    """Warm-up, then cosine decay to a twentieth; by steps."""

    def __init__(self, opt: torch.optim.Optimizer, lr: float, steps: int, warmup: int = 100) -> None:
        self.opt, self.lr, self.steps, self.warmup = opt, lr, steps, warmup

    def set(self, step: int) -> None:
        done = min(step / self.steps, 1.0)
        scale = min((step + 1) / self.warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.opt.param_groups:
            group["lr"] = self.lr * scale


def visual_states(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of the tower's feature layer and of its last layer, (B, 1 + PATCHES, WIDTH) each."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return [out.hidden_states[-2], out.hidden_states[-1]]


@dataclass
class Answers:
    """Logits and targets of the answer tokens, and the grounding loss."""

    logits: torch.Tensor
    target: torch.Tensor
    grounding: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Cross-entropy of the answers plus the weighted grounding loss."""
        return F.cross_entropy(self.logits, self.target) + GROUND_WEIGHT * self.grounding

    @property
    def correct(self) -> torch.Tensor:
        """(M,) bool."""
        return self.logits.argmax(-1) == self.target


def answer(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    visual: torch.Tensor,
    where: torch.Tensor,
    pack: batches.Pack,
    labels: dict[str, torch.Tensor],
) -> Answers:
    """Answer packed questions; ``visual`` (B, N, WIDTH) stands at raster places ``where`` (B, N).

    The grounding loss teaches two heads of one layer to look from a noun at the patches that show it, and the noun's state
    after that layer to say what and where it is: without it, binding a colour and a shape to one place is a plateau of
    thousands of steps.
    """
    size = visual.shape[0]
    embed = model.get_input_embeddings()
    prefix = embed(batches.PREFIX_IDS).expand(size, -1, -1)
    inputs = torch.cat([prefix, visual, embed(pack.ids)], 1)
    start = torch.arange(batches.PREFIX).expand(size, -1)
    positions = torch.cat([start, where + batches.PREFIX, pack.positions], 1)
    text = batches.PREFIX + visual.shape[1]  # first text column
    regions = pack.regions.gather(2, where[:, None].expand(-1, pack.regions.shape[1], -1))
    losses: list[torch.Tensor] = []

    def ground(module, query, key, mask, kwargs) -> None:
        rows = pack.nouns.clamp(min=0) + text
        seen = attention_rows(module, query, key, mask, kwargs, rows)[:, :GROUND_HEADS]
        mass = (seen[..., batches.PREFIX : text] * regions[:, None]).sum(-1)
        shown = (pack.nouns >= 0) & regions.any(-1)
        losses.append(-(mass + 1e-4).log().mean(1)[shown].mean())

    def relate(module, query, key, mask, kwargs) -> None:
        first, second, answering = (pack.pairs.clamp(min=0) + text).unbind(-1)
        seen = attention_rows(module, query, key, mask, kwargs, answering)
        mass = torch.cat([seen[:, h].gather(-1, at[..., None]) for h, at in enumerate((first, second))], -1)
        losses.append(-(mass + 1e-4).log().sum(-1)[pack.pairs[..., 0] >= 0].sum() / max(int((pack.pairs[..., 0] >= 0).sum()), 1))

    def name(module, args, output) -> None:
        rows = (pack.nouns.clamp(min=0) + text)[..., None].expand(-1, -1, WIDTH)
        losses.append(heads.noun_loss(output.gather(1, rows), labels, pack))

    layer = model.model.language_model.layers[GROUND_LAYER]
    handle = layer.register_forward_hook(name)
    with tap(layer.self_attn, ground), tap(model.model.language_model.layers[RELATE_LAYER].self_attn, relate):
        hidden = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=batches.attention_mask(visual.shape[1], pack.block),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    handle.remove()
    target = pack.labels[:, 1:]
    asked = target != -100
    return Answers(model.lm_head(hidden[:, text:-1][asked]), target[asked], sum(losses))


class Meter:
    """Loss and exact-answer rate by question kind, averaged since the last report."""

    def __init__(self) -> None:
        self.right, self.total, self.losses = defaultdict(float), defaultdict(int), []

    def add(self, answers: Answers, pack: batches.Pack) -> None:
        self.losses.append((answers.loss.item(), answers.grounding.item()))
        wrong = torch.zeros(pack.labels.shape, dtype=torch.bool)
        asked = pack.labels[:, 1:] != -100
        wrong[:, 1:][asked] = ~answers.correct
        exact = ~wrong.view(len(pack.kinds), -1, pack.length).any(-1)
        for row, kinds in zip(exact.tolist(), pack.kinds, strict=True):
            for ok, kind in zip(row, kinds, strict=False):
                self.right[kind] += ok
                self.total[kind] += 1

    def report(self) -> str:
        kinds = " ".join(f"{k[:4]} {self.right[k] / self.total[k]:.2f}" for k in KINDS if self.total[k])
        loss, grounding = (sum(values) / len(values) for values in zip(*self.losses, strict=True))
        text = f"loss {loss:.3f} ground {grounding:.2f} | {kinds}"
        self.__init__()
        return text


def steps(limit: int, minutes: float) -> Iterator[int]:
    """0, 1, ... until ``limit`` steps or ``minutes`` have passed."""
    start = time.time()
    for step in range(limit):
        if time.time() - start > minutes * 60:
            return
        yield step


def foreground_first(labels: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """(B, number) raster places: everything that is not background, filled up with random background."""
    order = torch.rand(labels["kind"].shape) + 10.0 * (labels["kind"] != 0)
    return order.topk(number, 1).indices.sort(1).values


def teach_decoder(
    model, symbols: Symbols, heads: Heads, limit: int, minutes: float, save, kinds: list[str], binding: bool, lr: float = 1.5e-3
) -> None:
    """Phases 1 and 2: answer questions of some ``kinds`` about symbolic pictures, simple ones first."""
    rng = batches.train_rng(5 if binding else 1)
    parts = [model.model.language_model, symbols, heads.noun]
    params = [p for part in parts for p in part.parameters()]
    opt = optimizer(params, lr)
    schedule, meter = Schedule(opt, lr, HORIZON), Meter()
    for step in steps(limit, minutes):
        schedule.set(step)
        simple = step < EASY_STEPS
        most = (4 if binding else 2) if simple else 6
        confusable = binding and step % 4 != 3
        batch = batches.scene_batch(16, rng, pixels=False, most_shapes=most, confusable=confusable)
        pack = batches.pack(batch.scenes, 10, kinds, rng)
        where = foreground_first(batch.labels, 32 if simple else 56)
        visual = symbols({k: v.gather(1, where) for k, v in batch.labels.items()}, dropout=0.02)
        visual = visual + 0.03 * torch.randn_like(visual)
        found = answer(model, heads, visual, where, pack, batch.labels)
        opt.zero_grad(set_to_none=True)
        found.loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        meter.add(found, pack)
        if step % 50 == 49:
            log.info("decoder %d %s", step + 1, meter.report())
        if step % 250 == 249:
            save()
    save()


def field_accuracy(heads: Heads, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> str:
    parts = []
    for name, head in heads.patch.items():
        known = labels[name] != IGNORE
        right = (head(features).argmax(-1) == labels[name])[known]
        parts.append(f"{name[:5]} {right.float().mean():.2f}")
    return " ".join(parts)


def teach_tower(model, heads: Heads, limit: int, minutes: float, save, seed: int = 2, lr: float = 1.5e-3) -> None:
    """Phase 3: dense patch labels and picture labels from pixels."""
    rng = batches.train_rng(seed)
    tower = model.model.vision_tower
    params = [*tower.parameters(), *heads.parameters()]
    opt = optimizer(params, lr)
    schedule, losses = Schedule(opt, lr, limit), []
    for step in steps(limit, minutes):
        schedule.set(step)
        batch = batches.scene_batch(16, rng, crowded=step % 4 != 3)
        states = visual_states(model, batch.pixels)
        loss = heads.dense_loss(states[0][:, 1:], batch.labels)
        loss = loss + 4 * heads.picture_loss([state[:, 0] for state in states], batch.picture)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        losses.append(loss.item())
        if step % 50 == 49:
            with torch.no_grad():
                found = field_accuracy(heads, states[0][:, 1:], batch.labels)
            log.info("tower %d loss %.3f | %s", step + 1, sum(losses) / len(losses), found)
            losses.clear()
        if step % 500 == 499:
            save()
    save()


def sincos_positions(model: LlavaForConditionalGeneration) -> None:
    """Start the tower's position table from 2-D sines: neighbours are found from the first step on."""
    table = model.model.vision_tower.embeddings.position_embedding.weight
    side, quarter = batches.GRID, WIDTH // 4
    freq = 1.0 / 50 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * freq for axis in (x, y)]
    with torch.no_grad():
        table[1:] = 0.2 * torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def align(model, symbols: Symbols, limit: int, minutes: float, seed: int = 3, lr: float = 2e-3) -> None:
    """Phase 4: the projector turns the tower's features into the decoder's symbolic tokens; only it is trained."""
    rng = batches.train_rng(seed)
    projector = model.model.multi_modal_projector
    opt = optimizer(projector.parameters(), lr)
    schedule, losses = Schedule(opt, lr, limit, warmup=20), []
    for step in steps(limit, minutes):
        schedule.set(step)
        batch = batches.scene_batch(16, rng, crowded=step % 2 == 0)
        with torch.no_grad():
            features = visual_states(model, batch.pixels)[0][:, 1:]
            wanted = symbols(batch.labels)
        loss = symbol_loss(projector(features), wanted, batch.labels)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        losses.append(loss.item() / wanted.var().item())
        if step % 50 == 49:
            log.info("align %d unexplained variance %.3f", step + 1, sum(losses) / len(losses))
            losses.clear()


def symbol_loss(visual: torch.Tensor, wanted: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Squared distance (a mean over channels) to the symbolic tokens, over the patches whose content is clear."""
    weight = torch.where(labels["kind"] > 0, 3.0, 1.0) * (labels["kind"] != IGNORE)
    return ((visual - wanted).square().mean(-1) * weight).sum() / weight.sum()


def teach_all(
    model, heads: Heads, limit: int, minutes: float, save, seed: int = 4, lr: float = 1e-3
) -> None:
    """Phase 5: the whole model answers questions about pictures; the dense losses keep the tower honest."""
    rng = batches.train_rng(seed)
    params = [*model.parameters(), *heads.parameters()]
    opt = optimizer(params, lr)
    schedule, meter, others = Schedule(opt, lr, limit), Meter(), []
    everywhere = torch.arange(batches.PATCHES).expand(16, -1)
    for step in steps(limit, minutes):
        schedule.set(step)
        batch = batches.scene_batch(16, rng)
        pack = batches.pack(batch.scenes, 10, HARD_KINDS, rng)
        states = visual_states(model, batch.pixels)
        visual = model.model.multi_modal_projector(states[0][:, 1:])
        found = answer(model, heads, visual, everywhere, pack, batch.labels)
        dense = heads.dense_loss(states[0][:, 1:], batch.labels)
        picture = heads.picture_loss([state[:, 0] for state in states], batch.picture)
        opt.zero_grad(set_to_none=True)
        (found.loss + 0.05 * dense + 0.5 * picture).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        meter.add(found, pack)
        others.append((dense.item(), picture.item()))
        if step % 50 == 49:
            dense_mean, picture_mean = (sum(x) / len(others) for x in zip(*others, strict=True))
            log.info("joint %d %s | dense %.2f cls %.3f", step + 1, meter.report(), dense_mean, picture_mean)
            others.clear()
        if step % 250 == 249:
            save()
    save()


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save model (float16) and processor as `transformers` loads them, and the digest that is checked at load."""
    model.half().save_pretrained(folder)
    model.float()
    build_processor().save_pretrained(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "sha256").write_text(digest + "\n")


class Run:
    """Checkpoints of the phases in one folder, so that each phase can be run and repeated alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.symbols, self.heads = build_model(), Symbols(), Heads()
        sincos_positions(self.model)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {
            "lm": self.model.model.language_model,
            "symbols": self.symbols,
            "tower": self.model.model.vision_tower,
            "heads": self.heads,
            "noun": self.heads.noun,
            "projector": self.model.model.multi_modal_projector,
        }

    def save(self, phase: str, names: tuple[str, ...]) -> None:
        torch.save({name: self.parts[name].state_dict() for name in names}, self.folder / f"{phase}.pt")

    def load(self, phase: str) -> None:
        for name, state in torch.load(self.folder / f"{phase}.pt").items():
            self.parts[name].load_state_dict(state)

    def _save_decoder(self) -> None:
        self.save("decoder", ("lm", "symbols", "noun"))

    def decoder(self, limit: int, minutes: float) -> None:
        self.symbols.start_from_words(self.model.get_input_embeddings().weight)
        teach_decoder(self.model, self.symbols, self.heads, limit, minutes, self._save_decoder, list(KINDS), binding=False)

    def binding(self, limit: int, minutes: float) -> None:
        self.load("decoder")
        teach_decoder(self.model, self.symbols, self.heads, limit, minutes, self._save_decoder, BINDING_KINDS, binding=True)

    def tower(self, limit: int, minutes: float) -> None:
        teach_tower(self.model, self.heads, limit, minutes, lambda: self.save("tower", ("tower", "heads")))

    def align(self, limit: int, minutes: float) -> None:
        self.load("tower")
        self.load("decoder")
        align(self.model, self.symbols, limit, minutes)
        self.save("align", tuple(self.parts))

    def joint(self, limit: int, minutes: float) -> None:
        self.load("align")
        teach_all(self.model, self.heads, limit, minutes, lambda: self.save("joint", tuple(self.parts)))
        export(self.model, self.folder / "export")


PHASES = {"decoder": 2500, "binding": 3000, "tower": 4000, "align": 400, "joint": 3000}
"""Phase -> steps."""


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=[*PHASES, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the phase's own number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop a phase after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    run = Run(args.out)
    for phase in PHASES if args.phase == "all" else [args.phase]:
        getattr(run, phase)(args.steps or PHASES[phase], args.minutes)


if __name__ == "__main__":
    main()
