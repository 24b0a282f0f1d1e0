# SPDX-License-Identifier: Apache-2.0
"""Train the embedded LLaVA from scratch, in five phases.

1. ``decoder``: the Llama decoder learns to answer about *symbolic* pictures, whose visual tokens are sums of label
   embeddings. No pixels: it finds the hard part, binding question words to visual tokens, in minutes.
2. ``binding``: the same with the questions that need a colour and a shape at one place.
3. ``tower``: the CLIP tower learns what lies under each patch (dense labels) and, on [CLS], what the picture shows.
4. ``align``: the projector learns to turn the tower's features into the decoder's symbolic tokens.
5. ``joint``: everything together on pictures and questions, next-token loss plus the dense losses.

    python -m vtoken.mini.training all --out build/mini-llava
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from vtoken.mini.model import WIDTH, build_model, build_processor
from vtoken.mini.training import phases
from vtoken.mini.training.supervision import Heads, Symbols
from vtoken.mini.world import GRID


def sincos_positions(model: LlavaForConditionalGeneration) -> None:
    """Start the tower's position table from 2-D sines: neighbours are found from the first step on."""
    table = model.model.vision_tower.embeddings.position_embedding.weight
    side, quarter = GRID, WIDTH // 4
    freq = 1.0 / 50 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * freq for axis in (x, y)]
    with torch.no_grad():
        table[1:] = 0.2 * torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


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
        self.symbols.start_from_words(self.model.model.language_model.embed_tokens.weight)
        phases.teach_decoder(self.model, self.symbols, self.heads, limit, minutes, self._save_decoder, binding=False)

    def binding(self, limit: int, minutes: float) -> None:
        self.load("decoder")
        phases.teach_decoder(self.model, self.symbols, self.heads, limit, minutes, self._save_decoder, binding=True)

    def tower(self, limit: int, minutes: float) -> None:
        phases.teach_tower(self.model, self.heads, limit, minutes, lambda: self.save("tower", ("tower", "heads")))

    def align(self, limit: int, minutes: float) -> None:
        self.load("tower")
        self.load("decoder")
        phases.align(self.model, self.symbols, limit, minutes)
        self.save("align", tuple(self.parts))

    def joint(self, limit: int, minutes: float) -> None:
        self.load("align")
        phases.teach_all(self.model, self.heads, limit, minutes, lambda: self.save("joint", tuple(self.parts)))
        export(self.model, self.folder / "export")


PHASES = {"decoder": 2500, "binding": 1500, "tower": 4000, "align": 600, "joint": 1500}
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
