# SPDX-License-Identifier: Apache-2.0
"""What the phases learn from besides answers: symbolic pictures, and classifiers that are thrown away afterwards."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vtoken.mini.model import VOCAB, WIDTH
from vtoken.mini.training.batches import Pack
from vtoken.mini.training.labels import FIELDS, IGNORE, PICTURE_LABELS
from vtoken.mini.world import COLORS, LETTERS, SHAPES

FIELD_WEIGHTS = {"row": 0.2, "column": 0.2, "letter": 3.0, "digit": 3.0, "shape": 3.0, "index": 3.0, "center": 3.0}
NOUN_FIELDS = ("color", "shape", "row", "column")


class Symbols(nn.Module):
    """Label embeddings: the visual tokens of a picture whose content is known."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterDict({name: 0.1 * torch.randn(size, WIDTH) for name, size in FIELDS.items()})

    def start_from_words(self, words: torch.Tensor) -> None:
        """Give a label the embedding of its word: question words and visual tokens then match from the start."""
        names = {"color": COLORS, "shape": SHAPES, "digit": "0123456789", "letter": [f"##{x}" for x in LETTERS]}
        with torch.no_grad():
            for field, labels in names.items():
                self.tables[field].copy_(words[[VOCAB[label] for label in labels]])

    def forward(self, labels: dict[str, torch.Tensor], dropout: float = 0.0) -> torch.Tensor:
        """(B, N, WIDTH) sums over the fields that apply; ``dropout`` forgets single fields of single patches."""
        out = torch.zeros(*labels["kind"].shape, WIDTH)
        for name, table in self.tables.items():
            known = labels[name] != IGNORE
            if dropout:
                known = known & (torch.rand(known.shape) >= dropout)
            out = out + table[labels[name].clamp(min=0)] * known[..., None]
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
            logits = head(features).flatten(0, 1)
            loss = F.cross_entropy(logits, labels[name].flatten(), ignore_index=IGNORE)
            total = total + FIELD_WEIGHTS.get(name, 1.0) * loss
        return total

    def noun_loss(self, states: torch.Tensor, labels: dict[str, torch.Tensor], pack: Pack) -> torch.Tensor:
        """Cross-entropy of what and where an item is, from the decoder's states (B, R, WIDTH) of its noun."""
        total = states.new_zeros(())
        for name, head in self.noun.items():
            target = labels[name].gather(1, pack.centers).masked_fill(pack.nouns < 0, IGNORE)
            total = total + F.cross_entropy(head(states).flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        return total

    def picture_loss(self, cls: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Multi-label loss of the [CLS] states (B, WIDTH) of the feature layer and of the last layer."""
        rare = torch.tensor(5.0)  # a label is absent from most pictures
        pairs = zip(self.picture, cls, strict=True)
        losses = [F.binary_cross_entropy_with_logits(head(state), target, pos_weight=rare) for head, state in pairs]
        return torch.stack(losses).sum()
