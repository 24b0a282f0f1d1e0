# SPDX-License-Identifier: Apache-2.0
"""What the phases learn from besides answers: symbolic pictures, and classifiers that are thrown away afterwards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from vtoken.mini.model import WIDTH
from vtoken.mini.models.base import VOCAB
from vtoken.mini.training.batches import Pack
from vtoken.mini.training.labels import FIELDS, IGNORE, PICTURE_LABELS
from vtoken.mini.world import CHARACTERS, COLORS, MOTIONS, SHAPES

FIELD_WEIGHTS = {"row": 0.2, "column": 0.2, "letter": 3.0, "digit": 3.0, "shape": 3.0, "index": 3.0, "center": 3.0}
NOUN_FIELDS = ("color", "shape", "row", "column")
PLACE_FIELDS = ("row", "column", "index")
"""What a tower without absolute positions cannot know: where a token is, and where a letter is in its word."""
_WORDS = {
    "color": list(COLORS),
    "shape": list(SHAPES),
    "digit": list("0123456789"),
    "letter": [f"##{character}" for character in CHARACTERS],
    "motion": [word if word in VOCAB else "things" for word in MOTIONS],
}


def _known(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the labels that apply; zero if none does."""
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / (target != IGNORE).sum().clamp(min=1)


class Symbols(nn.Module):
    """Label embeddings: the visual tokens of a document whose content is known.

    Parameters
    ----------
    unseen : iterable of str
        Fields that the model's tower cannot know.
    """

    def __init__(self, unseen: Iterable[str] = ()) -> None:
        super().__init__()
        self.unseen = frozenset(unseen)
        self.tables = nn.ParameterDict({name: 0.1 * torch.randn(size, WIDTH) for name, size in FIELDS.items()})

    def start_from_words(self, words: torch.Tensor) -> None:
        """Give a label the embedding of its word: question words and visual tokens then match from the start."""
        with torch.no_grad():
            for field, labels in _WORDS.items():
                rows = [VOCAB[label] for label in labels]
                if max(rows) < len(words):
                    self.tables[field].copy_(words[rows])

    def start_from_features(self, labels: dict[str, torch.Tensor], features: torch.Tensor) -> None:
        """Fit the label embeddings of what was seen to a trained model's visual tokens (M, WIDTH), labels (M,) each."""
        seen, blocks = [], []
        for name, size in FIELDS.items():
            for label in range(size):
                if (here := labels[name] == label).any():
                    seen.append((name, label))
                    blocks.append(here)
        design = torch.stack(blocks, 1).float()
        penalty = 1e-2 * torch.eye(len(seen))
        fitted = torch.linalg.solve(design.T @ design + penalty, design.T @ features)
        with torch.no_grad():
            for (name, label), row in zip(seen, fitted, strict=True):
                self.tables[name][label] = row

    def forward(self, labels: dict[str, torch.Tensor], dropout: float = 0.0) -> torch.Tensor:
        """(B, N, WIDTH) sums over the fields that apply; ``dropout`` forgets single fields of single tokens."""
        out = torch.zeros(*labels["kind"].shape, WIDTH)
        for name, table in self.tables.items():
            known = labels[name] != IGNORE
            if name in self.unseen or not known.any():
                continue
            if dropout:
                known = known & (torch.rand(known.shape) >= dropout)
            out = out + table[labels[name].clamp(min=0)] * known[..., None]
        return out


class Heads(nn.Module):
    """Linear classifiers of the dense labels and of the picture labels; they are not shipped."""

    def __init__(self, unseen: Iterable[str] = (), tower_width: int = WIDTH) -> None:
        super().__init__()
        self.places_unseen = bool(unseen)
        seen = {name: size for name, size in FIELDS.items() if name not in unseen}
        self.patch = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in seen.items()})
        self.picture = nn.ModuleList([nn.Linear(tower_width, PICTURE_LABELS) for _ in range(2)])
        self.noun = nn.ModuleDict({name: nn.Linear(WIDTH, FIELDS[name]) for name in NOUN_FIELDS})
        self.place = nn.ModuleDict({name: nn.Linear(WIDTH, FIELDS[name]) for name in PLACE_FIELDS})

    def dense_loss(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of every field over the tokens to which it applies; ``features`` (B, N, WIDTH)."""
        losses = [
            FIELD_WEIGHTS.get(name, 1.0) * _known(head(features), labels[name]) for name, head in self.patch.items()
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> str:
        """Share of the tokens whose label the heads find, by field."""
        parts = []
        for name, head in self.patch.items():
            known = labels[name] != IGNORE
            if known.any():
                right = (head(features).argmax(-1) == labels[name])[known]
                parts.append(f"{name[:5]} {right.float().mean():.2f}")
        return " ".join(parts)

    def noun_loss(self, states: torch.Tensor, labels: dict[str, torch.Tensor], pack: Pack) -> torch.Tensor:
        """Cross-entropy of what and where an item is, from the decoder's states (B, R, WIDTH) of its noun."""
        total = states.new_zeros(())
        for name, head in self.noun.items():
            target = labels[name].gather(1, pack.centers).masked_fill(pack.nouns < 0, IGNORE)
            total = total + _known(head(states), target)
        return total

    def place_loss(self, states: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of row and column, from the decoder's states (M, WIDTH) of the visual tokens."""
        losses = [_known(head(states), labels[name].flatten()) for name, head in self.place.items()]
        return torch.stack(losses).sum()

    def picture_loss(self, cls: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Multi-label loss of the [CLS] states (B, WIDTH) of the feature layer and of the last layer."""
        rare = torch.tensor(5.0)  # a label is absent from most pictures
        pairs = zip(self.picture, cls, strict=True)
        losses = [F.binary_cross_entropy_with_logits(head(state), target, pos_weight=rare) for head, state in pairs]
        return torch.stack(losses).sum()
