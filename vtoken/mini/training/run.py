# SPDX-License-Identifier: Apache-2.0
"""What every training shares: the modules of a model and its checkpoints in one folder."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtoken.mini.models.base import Architecture
from vtoken.mini.training.labels import IGNORE
from vtoken.mini.training.loop import Meter
from vtoken.mini.training.supervision import PLACE_FIELDS, Heads, Symbols
from vtoken.mini.training.tower import ClsStates

log = logging.getLogger("vtoken.mini")

REPORT, SAVE = 25, 100  # steps


class Run:
    """The phases of one model are methods of its subclasses, each of which can be run and repeated alone.

    Parameters
    ----------
    architecture : Architecture
        What is trained.
    folder : Path
        Of the checkpoints, and of the exported model.
    """

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        folder.mkdir(parents=True, exist_ok=True)
        unseen = PLACE_FIELDS if architecture.positions_unseen else ()
        self.model: Any = architecture.build_model(0)
        self._recorder: ClsStates | None = None
        self.symbols, self.heads = Symbols(unseen), Heads(unseen, architecture.tower_width)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Everything that a checkpoint holds."""
        return {"model": self.model.model, "symbols": self.symbols, "heads": self.heads}

    def save(self, phase: str) -> None:
        """Write the checkpoint of a phase."""
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, self.folder / f"{phase}.pt")

    def load(self, phase: str) -> None:
        """Go back to the checkpoint of a phase."""
        for name, state in torch.load(self.folder / f"{phase}.pt").items():
            self.parts[name].load_state_dict(state)

    def cls_states(self) -> ClsStates | None:
        """A recorder of the tower's [CLS], if it has one."""
        if self._recorder is not None:
            self._recorder.close()
        layers = self.architecture.cls_layers
        self._recorder = ClsStates(self.model.model.get_submodule(layers)) if layers else None
        return self._recorder

    def tower_parameters(self, inside: bool) -> list[nn.Parameter]:
        """Those of the vision tower, or all others."""
        named = self.model.model.named_parameters()
        return [p for name, p in named if name.startswith(self.architecture.tower) is inside]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """What learns from symbolic documents."""
        modules = (self.model.model.language_model, self.symbols, self.heads.noun, self.heads.place)
        return [p for module in modules for p in module.parameters()]

    def report(self, phase: str, step: int, meter: Meter) -> None:
        """Log and save now and then."""
        if step % REPORT == REPORT - 1:
            log.info("%s %d %s", phase, step + 1, meter.report())
        if step % SAVE == SAVE - 1:
            self.save(phase)

    def run(self, phase: str, limit: int, minutes: float) -> None:
        """Run one phase and note its minutes in ``times.json``: on the clock, and of processor time."""
        start, used = time.time(), time.process_time()
        getattr(self, phase)(limit, minutes)
        passed, used = (time.time() - start) / 60, (time.process_time() - used) / 60
        log.info("%s took %.1f minutes, %.1f of processor time", phase, passed, used)
        path = self.folder / "times.json"
        times = json.loads(path.read_text()) if path.is_file() else {}
        times[phase] = {"clock": round(passed, 1), "processor": round(used, 1)}
        path.write_text(json.dumps(times, indent=1) + "\n")


def match_loss(visual: torch.Tensor, wanted: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Share of the variance of the wanted visual tokens (B, N, WIDTH) that is missed; background counts a third."""
    weight = torch.where(kind > 0, 3.0, 1.0) * (kind != IGNORE)
    return ((visual - wanted).square().mean(-1) * weight).sum() / weight.sum() / wanted.var()
