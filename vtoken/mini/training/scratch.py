# SPDX-License-Identifier: Apache-2.0
"""Train ``mini-llava`` from scratch, in five phases.

1. ``decoder``: the decoder learns to answer about *symbolic* pictures, whose visual tokens are sums of label
   embeddings. No pixels: it finds the hard part, binding question words to visual tokens, in minutes.
2. ``binding``: the same with the questions that need a colour and a shape at one place.
3. ``tower``: the CLIP tower learns what lies under each patch (dense labels) and, on [CLS], what the picture shows.
4. ``align``: the projector learns to turn the tower's features into the decoder's symbolic tokens.
5. ``joint``: everything together on pictures and questions, next-token loss plus the dense losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtoken.mini.models.base import Architecture, sincos
from vtoken.mini.questions import KINDS
from vtoken.mini.training.answering import answer
from vtoken.mini.training.batches import SCENE_ASKS, Pack, ask, pack, train_rng
from vtoken.mini.training.export import export
from vtoken.mini.training.feed import HARD_KINDS, Feed, Shown
from vtoken.mini.training.loop import Meter, Trainer, steps
from vtoken.mini.training.run import REPORT, SAVE, Run, log, match_loss
from vtoken.mini.training.tower import encode, view_labels
from vtoken.mini.world import CELLS, GRID, sample_scene

BATCH, QUESTIONS = 16, 10  # scenes a step, questions a scene
EASY_STEPS = 600  # with few shapes a scene: binding is found there first
HORIZON = 6000  # steps of the decoder's learning-rate schedule, of which each phase takes the beginning
BINDING_KINDS = [*KINDS, *["left of"] * 4, "beside", "beside", "digit", "word", "count"]


def foreground_first(kind: torch.Tensor, number: int) -> torch.Tensor:
    """(B, number) places in raster order: everything that is not background, filled up with random background."""
    order = torch.rand(kind.shape) + 10.0 * (kind > 0)
    return order.topk(number, 1).indices.sort(1).values


class Scratch(Run):
    """The phases of ``mini-llava``."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        super().__init__(architecture, folder)
        table = self.model.model.vision_tower.embeddings.position_embedding.weight
        with torch.no_grad():
            table[1:] = sincos(GRID, table.shape[1])

    def _scenes(self, feed: Feed, **options: Any) -> Shown:
        documents = [[sample_scene(feed.rng, **options)] for _ in range(BATCH)]
        return feed.show("scene", documents, (CELLS, CELLS))

    def _asked(self, shown: Shown, kinds: list[str], feed: Feed) -> Pack:
        asks = [SCENE_ASKS[kind] for kind in kinds]
        asked = [ask(scenes, QUESTIONS, asks, feed.rng) for scenes in shown.batch.scenes]
        return pack(asked, shown.batch.places)

    def decoder(self, limit: int, minutes: float) -> None:
        """Phase 1."""
        self.symbols.start_from_words(self.model.get_input_embeddings().weight)
        self._symbolic(limit, minutes, list(KINDS), seed=1, rate=1.5e-3, binding=False)

    def binding(self, limit: int, minutes: float) -> None:
        """Phase 2."""
        self.load("decoder")
        self._symbolic(limit, minutes, BINDING_KINDS, seed=5, rate=1e-3, binding=True)

    def _symbolic(self, limit: int, minutes: float, kinds: list[str], seed: int, rate: float, binding: bool) -> None:
        feed, meter = Feed(self.architecture, self.model, train_rng(seed)), Meter()
        trainer = Trainer([(self.decoder_parameters(), rate)], HORIZON)
        for step in steps(limit, minutes):
            simple = step < EASY_STEPS
            most = (4 if binding else 2) if simple else 6
            shown = self._scenes(feed, most_shapes=most, confusable=binding and step % 4 != 3)
            asked, labels = self._asked(shown, kinds, feed), shown.batch.labels
            visual = self.symbols(labels, dropout=0.02)
            visual = visual + 0.03 * torch.randn_like(visual)
            where = foreground_first(labels["kind"], 32 if simple else 56)
            found = answer(self.model, self.heads, visual, shown.prompt, asked, labels, where)
            trainer.step(step, found.loss)
            meter.add(found, asked)
            self.report("decoder", step, meter)
        self.save("decoder")

    def tower(self, limit: int, minutes: float) -> None:
        """Phase 3."""
        self.load("decoder")
        feed, states = Feed(self.architecture, self.model, train_rng(2)), self.cls_states()
        assert states is not None, "the tower of mini-llava has a [CLS]"
        tower = self.model.model.vision_tower
        trainer = Trainer([([*tower.parameters(), *self.heads.parameters()], 1.5e-3)], limit)
        for step in steps(limit, minutes):
            shown = self._scenes(feed, crowded=step % 4 != 3)
            labels = shown.batch.labels
            features = tower(**feed.pixels(shown), output_hidden_states=True).hidden_states[-2][:, 1:]
            loss = self.heads.dense_loss(features, labels)
            loss = loss + 4 * self.heads.picture_loss(states.take(), view_labels(shown.batch))
            trainer.step(step, loss)
            if step % REPORT == REPORT - 1:
                log.info("tower %d loss %.3f | %s", step + 1, loss.item(), self.heads.accuracy(features, labels))
            if step % SAVE == SAVE - 1:
                self.save("tower")
        self.save("tower")

    def align(self, limit: int, minutes: float) -> None:
        """Phase 4; only the projector is trained."""
        self.load("tower")
        feed = Feed(self.architecture, self.model, train_rng(3))
        trainer = Trainer([(list(self.model.model.multi_modal_projector.parameters()), 2e-3)], limit, warmup=20)
        for step in steps(limit, minutes):
            shown = self._scenes(feed, crowded=step % 2 == 0)
            wanted = self.symbols(shown.batch.labels).detach()
            loss = match_loss(encode(self.model, feed.pixels(shown), BATCH), wanted, shown.batch.labels["kind"])
            trainer.step(step, loss)
            if step % REPORT == REPORT - 1:
                log.info("align %d unexplained variance %.3f", step + 1, loss.item())
        self.save("align")

    def joint(self, limit: int, minutes: float) -> None:
        """Phase 5."""
        self.load("align")
        feed, meter, states = Feed(self.architecture, self.model, train_rng(4)), Meter(), self.cls_states()
        assert states is not None, "the tower of mini-llava has a [CLS]"
        low = [*self.tower_parameters(True), *self.heads.parameters()]
        trainer = Trainer([(self.tower_parameters(False), 6e-4), (low, 2e-4)], limit)
        features: list[torch.Tensor] = []
        self.model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: features.append(args[0]))
        for step in steps(limit, minutes):
            shown = self._scenes(feed)
            asked, labels = self._asked(shown, HARD_KINDS, feed), shown.batch.labels
            visual = encode(self.model, feed.pixels(shown), BATCH)
            found = answer(self.model, self.heads, visual, shown.prompt, asked, labels)
            dense = self.heads.dense_loss(features.pop(), labels)
            picture = self.heads.picture_loss(states.take(), view_labels(shown.batch))
            trainer.step(step, found.loss + 0.2 * dense + 0.5 * picture)
            meter.add(found, asked)
            self.report("joint", step, meter)
        self.save("joint")
        export(self.model, self.architecture.build_processor(), self.folder / "export")
