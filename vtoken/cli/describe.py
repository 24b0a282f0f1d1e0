# SPDX-License-Identifier: Apache-2.0
"""What ``vtoken list`` shows, found out from the reducers and adapters themselves and written down beside this file.

It takes torch to import a reducer, and ``vtoken list`` must do without. So whoever changes what a reducer says of
itself runs this file again, of which a test reminds:

    python -m vtoken.cli.describe
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from vtoken.adapters import families
from vtoken.cli.catalogue import FILE
from vtoken.reducers.base import Reducer
from vtoken.registry import list_reducers, reducer_class

STAGES = {
    "before_tower": "before tower",
    "in_tower": "inside tower",
    "before_llm": "before LLM",
    "in_llm": "inside LLM",
    "light": "light layers",
}
SEEN = {"before_tower": "pixels", "thin_tower": "tower states"}
"""What stages in the vision tower look at, beside attention."""
_DEPTH = 32  # of the decoder that reducers are asked about


def describe(cls: type[Reducer]) -> tuple[str, str, str, str, str, str]:
    """Name, stages, needs, whether a server could use it, paper and summary of a reducer."""
    example = _example(cls)
    if example is None:
        return cls.name, "as its stages", "what its stages need", "", cls.paper, cls.summary
    stages = ", ".join(STAGES[stage] for stage in example.stages)
    serves = "yes" if can_serve(example) else "no"
    return cls.name, stages, ", ".join(needs(example)) or "nothing", serves, cls.paper, cls.summary


def can_serve(reducer: Reducer) -> bool:
    """Whether it chooses from one encoded picture alone, which an inference server keeps for any prompt to come."""
    return reducer.stages == ("before_llm",) and not reducer.uses_text and reducer.resampler is None


def needs(reducer: Reducer) -> list[str]:
    """What must be recorded while the model runs."""
    reads = (*reducer.tower_reads(), *(read.what for read in reducer.encoder_reads()))
    found = [f"tower attention ({what})" for what in reads]
    found += [what for hook, what in SEEN.items() if reducer.overrides(hook)]
    if reducer.needs_projector:
        found.append("projector")
    if reducer.resampler is not None:
        found.append("vision tower, twice")
    if taps := reducer.taps(_DEPTH):
        found.append(f"decoder attention ({', '.join(sorted(set(taps.values())))})")
    return list(dict.fromkeys(found))


def _example(cls: type[Reducer]) -> Reducer | None:
    """The reducer with default parameters; None for one that is made of others."""
    if any(field.name == "reducers" for field in dataclasses.fields(cls)):
        return None
    return cls()


def catalogue() -> dict[str, Any]:
    """The content of `FILE`: a line for each registered reducer, and every ``config.model_type`` that is served."""
    return {"reducers": [describe(reducer_class(name)) for name in list_reducers()], "families": sorted(families())}


if __name__ == "__main__":
    FILE.write_text(json.dumps(catalogue(), indent=1) + "\n", encoding="utf-8")
