# SPDX-License-Identifier: Apache-2.0
"""Train a model of another architecture from the weights of ``mini-llava``, in three phases.

0. ``places``, only where the tower cannot know them: the first layers learn where each visual token is;
1. ``decoder``: symbolic documents, whose visual tokens are sums of label embeddings, in the new model's own layout;
   then, where it is among the phases, ``spell``: the same, mostly reading;
2. ``tower``: tower and projector learn what each visual token shows, and to write it as those embeddings; at first
   mostly from scenes that are shown smaller, where a single patch shows more of a thing;
   then, where ``align`` is among the phases, the decoder learns to read what the tower writes;
3. ``joint``: the whole model answers questions about pixels; the dense losses keep the tower honest;
   then, where it is among the phases, ``polish``: the decoder alone again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtoken.mini import loader
from vtoken.mini.model import VOCAB as FIRST_VOCAB
from vtoken.mini.models import ARCHITECTURES
from vtoken.mini.models.base import VOCAB, Architecture
from vtoken.mini.training.answering import answer
from vtoken.mini.training.batches import train_rng
from vtoken.mini.training.export import export
from vtoken.mini.training.feed import Feed, Shown
from vtoken.mini.training.labels import FIELDS, IGNORE
from vtoken.mini.training.loop import Meter, Trainer, steps
from vtoken.mini.training.places import place_loss
from vtoken.mini.training.run import REPORT, SAVE, Run, log, match_loss
from vtoken.mini.training.starts import transplant, transplant_rotary
from vtoken.mini.training.supervision import Symbols
from vtoken.mini.training.tower import encode, view_labels
from vtoken.mini.world import CELLS, GRID, LETTERS, sample_scene

SHOWN = 0.5  # of the visual tokens of a symbolic document; what is left out is background
FITTED = 12  # batches from which the label embeddings start
CROWDED = 0.85  # of the tower's pictures
# of the tasks in a phase: spelling numbers is new to the decoder and takes the most steps
EMPHASIS = {
    "decoder": {"read": 4.0},
    "spell": {"read": 8.0},
    "align": {"read": 3.0},
    "polish": {"read": 3.0, "scene": 2.0, "video": 0.6},
}
TOWER_COLUMNS = 1800  # small batches: many steps leave the plateaus sooner
SEEN = {"scene": 0.8, "read": 0.2}  # tasks whose pictures teach the tower
SMALL = {8: 0.6, 6: 0.3, 5: 0.1}, {8: 0.1, 6: 0.3, 5: 0.6}  # cells a side: share at the start, and in the end
OFTEN, SELDOM = 0.6, 0.1  # share of the smaller scenes at the start, and in the end
DENSE, CLS = 0.2, 0.5  # weights of the joint phase's other losses
Show = Callable[[Feed, Shown], tuple[torch.Tensor, torch.Tensor | None]]  # visual tokens, and which of them are left


@torch.no_grad()
def fit_symbols(symbols: Symbols, name: str, source: Any) -> None:
    """Start the label embeddings from the visual tokens that the source model's decoder knows."""
    rng = train_rng(20)
    feed, tasks = Feed(ARCHITECTURES[name], source, rng), ARCHITECTURES[name].tasks
    shown = []
    for turn in range(FITTED):
        if tasks:
            shown.append(feed.draw(tasks, crowded=turn % 2 == 0))
        else:
            scenes = [[sample_scene(rng, crowded=turn % 2 == 0)] for _ in range(8)]
            shown.append(feed.show("scene", scenes, (CELLS, CELLS)))
    seen = [(s.batch.labels, feed.pixels(s)) for s in shown]
    features = torch.cat([encode(source, pixels, len(labels["kind"])).flatten(0, 1) for labels, pixels in seen])
    together = {field: torch.cat([labels[field].flatten() for labels, _ in seen]) for field in FIELDS}
    sure = together["kind"] != IGNORE
    symbols.start_from_features({field: values[sure] for field, values in together.items()}, features[sure])
    if not tasks:  # numerals were never printed: begin with the mean letter, and the numeral's word
        table, words = symbols.tables["letter"].data, source.get_input_embeddings().weight
        for numeral, row in enumerate(range(len(LETTERS), FIELDS["letter"])):
            table[row] = table[: len(LETTERS)].mean(0) + words[FIRST_VOCAB[str(numeral)]]


def _fitted(name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """An old parameter in the new one's shape: more words, fewer places."""
    if old.shape == new.shape:
        return old
    if "position_embedding" in name:
        side = round((len(new) - 1) ** 0.5)
        table = old[1:].view(GRID, GRID, -1)[:side, :side].flatten(0, 1)
        return torch.cat([old[:1], table])
    rows = new.clone() * old.std() / new.std()
    rows[: len(old)] = old
    return rows


def start_from(model: Any, source: Any, prefixes: Mapping[str, str]) -> None:
    """Copy parameters whose names begin with one of ``prefixes``."""
    old = dict(source.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            for new_prefix, old_prefix in prefixes.items():
                other = old_prefix + name.removeprefix(new_prefix)
                if name.startswith(new_prefix) and other in old:
                    parameter.copy_(_fitted(name, old[other], parameter))
                    break


def spell_numerals(words: torch.Tensor) -> None:
    """Start ``##7`` as what the spelled letters have in common and ``7`` has of its own (in place)."""
    letters = words[[VOCAB[f"##{letter}"] for letter in LETTERS]].mean(0)
    numerals = words[[VOCAB[str(n)] for n in range(10)]]
    words[[VOCAB[f"##{n}"] for n in range(10)]] = letters + numerals - numerals.mean(0)


def _small_cells(progress: float, rng: np.random.Generator) -> int:
    """How many cells a side the next scene of the tower's phase has; 0 for one of the usual size."""
    if rng.random() >= OFTEN + (SELDOM - OFTEN) * progress:
        return 0
    first, last = (np.array(list(shares.values())) for shares in SMALL)
    return int(rng.choice(list(SMALL[0]), p=first + (last - first) * progress))


class Transfer(Run):
    """The phases of a model that starts from another one's weights."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        super().__init__(architecture, folder)
        source, _ = loader.load(architecture.source)
        fit_symbols(self.symbols, architecture.source, source)
        start_from(self.model, source, architecture.transferred)
        if not ARCHITECTURES[architecture.source].tasks:  # it never read a number
            with torch.no_grad():
                spell_numerals(self.model.get_input_embeddings().weight)

    def _tasks(self, phase: str) -> dict[str, float]:
        """Shares of the tasks in a phase."""
        emphasis = EMPHASIS.get(phase, {})
        return {task: share * emphasis.get(task, 1.0) for task, share in self.architecture.tasks.items()}

    def _symbolic(self, shown: Shown, dropout: float = 0.0) -> torch.Tensor:
        visual = self.symbols(shown.batch.labels, dropout)
        newline = torch.from_numpy(shown.batch.places.view < 0)
        if newline.any():
            visual = torch.where(newline[:, None], self.model.model.image_newline, visual)
        return visual

    def _start_tower(self) -> None:
        """Begin a tower whose parameters have no namesakes in the source."""
        if not self.architecture.tower_start:
            return
        source, _ = loader.load("mini-llava")
        first = Feed(ARCHITECTURES["mini-llava"], source, train_rng(25))
        scenes = [[sample_scene(first.rng, crowded=True)] for _ in range(8)]
        pixels = first.pixels(first.show("scene", scenes, (CELLS, CELLS)))["pixel_values"]
        start = {"intern": transplant, "rotary": transplant_rotary}[self.architecture.tower_start]
        start(self.model.model.get_submodule(self.architecture.tower), source.model.vision_tower, pixels[..., ::2, ::2])

    def places(self, limit: int, minutes: float) -> None:
        """Before phase 1: where the visual tokens of symbolic documents are."""
        feed, losses = Feed(self.architecture, self.model, train_rng(24), TOWER_COLUMNS), []
        trainer = Trainer([(self.decoder_parameters(), 1.5e-3)], limit)
        for step in steps(limit, minutes):
            shown = feed.draw(self.architecture.tasks)
            visual = self._symbolic(shown, dropout=0.02)
            loss = place_loss(self.model, self.heads, visual, shown.prompt, shown.batch.labels, feed.rng)
            trainer.step(step, loss)
            losses.append(loss.item())
            if step % REPORT == REPORT - 1:
                log.info("places %d loss %.3f", step + 1, np.mean(losses))
                losses.clear()
        self.save("places")

    def decoder(self, limit: int, minutes: float) -> None:
        """Phase 1: questions about symbolic documents."""
        if "places" in self.architecture.steps:
            self.load("places")
        self._read("decoder", self._symbols_of, 8e-4, 21, limit, minutes)

    def spell(self, limit: int, minutes: float) -> None:
        """Phase 1 goes on, mostly reading."""
        self.load("decoder")
        self._read("spell", self._symbols_of, 6e-4, 27, limit, minutes)

    def _read(self, phase: str, show: Show, rate: float, seed: int, limit: int, minutes: float) -> None:
        """The decoder alone answers questions about the visual tokens that ``show`` makes."""
        feed, meter, tasks = Feed(self.architecture, self.model, train_rng(seed)), Meter(), self._tasks(phase)
        trainer = Trainer([(self.decoder_parameters(), rate)], limit)
        for step in steps(limit, minutes):
            shown = feed.draw(tasks)
            asked = feed.ask(shown)
            visual, where = show(feed, shown)
            found = answer(self.model, self.heads, visual, shown.prompt, asked, shown.batch.labels, where)
            trainer.step(step, found.loss)
            meter.add(found, asked)
            self.report(phase, step, meter)
        self.save(phase)

    def _symbols_of(self, feed: Feed, shown: Shown) -> tuple[torch.Tensor, torch.Tensor]:
        visual = self._symbolic(shown, dropout=0.02)
        visual = visual + 0.03 * torch.randn_like(visual)
        order = torch.rand(visual.shape[:2]) + 10.0 * (shown.batch.labels["kind"] > 0)
        return visual, order.topk(int(SHOWN * visual.shape[1]), 1).indices.sort(1).values

    @torch.no_grad()
    def _features_of(self, feed: Feed, shown: Shown) -> tuple[torch.Tensor, None]:
        return encode(self.model, feed.pixels(shown), len(shown.batch.scenes)), None

    def tower(self, limit: int, minutes: float) -> None:
        """Phase 2: dense labels, and the label embeddings as targets."""
        self.load("spell" if "spell" in self.architecture.steps else "decoder")
        feed, losses = Feed(self.architecture, self.model, train_rng(22), TOWER_COLUMNS), []
        self._start_tower()
        cls, seen = self.cls_states(), SEEN | {"video": self.architecture.tasks.get("video", 0.0)}
        trained = [*self.model.model.parameters(), *self.heads.parameters()]
        trainer = Trainer([(trained, 1.5e-3)], limit)
        for step in steps(limit, minutes):
            if self.architecture.tower_start and (cells := _small_cells(step / limit, feed.rng)):
                shown = feed.draw_small(cells)
            else:
                shown = feed.draw(seen, feed.rng.random() < CROWDED)
            labels = shown.batch.labels
            visual = encode(self.model, feed.pixels(shown), len(shown.batch.scenes))
            dense = self.heads.dense_loss(visual, labels)
            match = match_loss(visual, self._symbolic(shown).detach(), labels["kind"])
            loss = dense + 5 * match
            if cls is not None:
                loss = loss + 2 * self.heads.picture_loss(cls.take(), view_labels(shown.batch))
            trainer.step(step, loss)
            losses.append((dense.item(), match.item()))
            if step % REPORT == REPORT - 1:
                means = np.mean(losses, 0)
                accuracy = self.heads.accuracy(visual, labels)
                log.info("tower %d dense %.2f match %.3f | %s", step + 1, *means, accuracy)
                losses.clear()
            if step % SAVE == SAVE - 1:
                self.save("tower")
        self.save("tower")

    def align(self, limit: int, minutes: float) -> None:
        """Between phases 2 and 3: the decoder learns from the tower's own tokens, without the cost of its gradients."""
        self.load("tower")
        self._read("align", self._features_of, 6e-4, 26, limit, minutes)

    def polish(self, limit: int, minutes: float) -> None:
        """After phase 3 the same once more, gently."""
        self.load("joint")
        self._read("polish", self._features_of, 3e-4, 28, limit, minutes)
        self._export()

    def _export(self) -> None:
        export(self.model, self.architecture.build_processor(), self.folder / "export")

    def joint(self, limit: int, minutes: float) -> None:
        """Phase 3: everything together."""
        self.load("align" if "align" in self.architecture.steps else "tower")
        feed, meter = Feed(self.architecture, self.model, train_rng(23)), Meter()
        cls = self.cls_states()
        low = [*self.tower_parameters(True), *self.heads.parameters()]
        trainer = Trainer([(self.tower_parameters(False), 6e-4), (low, 2e-4)], limit)
        for step in steps(limit, minutes):
            shown = feed.draw(self.architecture.tasks)
            asked, labels = feed.ask(shown), shown.batch.labels
            visual = encode(self.model, feed.pixels(shown), len(shown.batch.scenes))
            found = answer(self.model, self.heads, visual, shown.prompt, asked, labels)
            loss = found.loss + DENSE * self.heads.dense_loss(visual, labels)
            if cls is not None:
                loss = loss + CLS * self.heads.picture_loss(cls.take(), view_labels(shown.batch))
            trainer.step(step, loss)
            meter.add(found, asked)
            self.report("joint", step, meter)
        self.save("joint")
        self._export()
