# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and of docs/ from committed results and from the registry.

What stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` is generated:

- ``reducers``: from the registry;
- ``families``: the adapters, and ``benchmarks/results/families.json``, what the tests show about each family
  (``pytest tests/engine tests/adapters --families-report benchmarks/results/families.json``);
- ``families/tried``: the same file, how many cases of each kind of fault were tried;
- ``types``: the adapters, and ``benchmarks/results/types.json``, what the tests show about each type of transformers
  (``pytest tests/adapters/test_generic.py --types-report benchmarks/results/types.json``); of types whose tests are not
  among these, what ``families.json`` says;
- ``mini_llava``: what the first embedded model can do (``benchmarks/mini_llava.py``);
- ``embedded``: what the others can do (``benchmarks/mini_models.py``);
- ``again``: weights of a second training beside the shipped ones;
- ``speed/NAME``: docs/speed.md, one benchmark each (``speed_tables.py``);
- ``minis/NAME``: ``benchmarks/results/minis.json``, all embedded models (``minis_tables.py``);
- ``repair/claims``: ``benchmarks/results/repair.json``, pruning with and without repair;
- ``NAME``: ``benchmarks/results/NAME.json``, a ``results.json`` of ``vtoken compare``;
- ``NAME/kinds``, ``NAME/note``: the same file, accuracy by kind of question, and how it was made;
- ``NAME/short``: the same file, unpruned and the lowest keep ratio but one;
- ``NAME/ranking``: the same file, the reducers at each keep ratio from best to worst, and which lose to chance.

    python benchmarks/readme_tables.py            rewrite the files
    python benchmarks/readme_tables.py --check    exit with 1 if one is stale
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from minis_tables import again, embedded, minis
from speed_tables import TABLES, speed
from tabular import markdown

from vtoken.adapters import families as known_families
from vtoken.adapters.generic import GenericAdapter
from vtoken.cli.describe import describe
from vtoken.eval.comparison.summary import Row, corrected, row_from
from vtoken.eval.report.columns import Column, lines_of, shown
from vtoken.eval.report.formats import SIGNIFICANT, difference_text
from vtoken.eval.report.tables import kinds_columns
from vtoken.registry import list_reducers, reducer_class

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table:(?P<name>[\w./-]+) -->\n?).*?(<!-- /table -->)", re.S)
FILES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
NO_TEST = "\N{EN DASH}"
LEGEND = (
    f"✓ tests pass, {NO_TEST} no test, refused: a test finds the sentence that refuses it. Tiny models with random "
    "weights, transformers {transformers}, torch {torch}, no GPU."
)


def catalogue() -> str:
    """The reducers, with links to their papers."""
    rows = []
    for name in list_reducers():
        _, stages, needs, servable, paper, summary = describe(reducer_class(name))
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "control"
        rows.append((f"`{name}`", summary, stages, needs, servable, link))
    return markdown(("reducer", "what it does", "acts", "needs", "servable", "paper"), rows, text_columns=6)


def families(report: dict) -> str:
    """The adapters with the model types they serve, and what the tests show about each of the types."""
    adapters: dict[type, list[str]] = {}
    for model_type, adapter in known_families().items():
        adapters.setdefault(adapter, []).append(f"`{model_type}`")
    rows = [(", ".join(types), _first_line(adapter)) for adapter, types in adapters.items()]
    served = markdown(("`config.model_type`", "what it is"), rows, text_columns=2)
    return f"{served}\n{evidence(report['families'])}\n{LEGEND.format(**report['versions'])}\n"


def tried(report: dict) -> str:
    """How many cases of each kind of fault passed, on how many reducers and on which families."""
    rows = []
    for kind, found in report["kinds"].items():
        by_family = ", ".join(f"{name} {count}" for name, count in found["families"].items())
        rows.append((kind, str(found["cases"]), str(len(found["reducers"])), by_family))
    rows.append(("all", str(sum(found["cases"] for found in report["kinds"].values())), "", ""))
    return markdown(("kind", "cases", "reducers", "cases by family"), rows, text_columns=4) + "\n"


def types(found: dict, families: dict) -> str:
    """Every image-text-to-text type of transformers: which adapter serves it, what the tests show, what is refused."""
    adapters = {
        name: "by convention" if adapter is GenericAdapter else f"`{adapter.__module__.rpartition('.')[2]}.py`"
        for name, adapter in known_families().items()
    }
    columns, tested = test_columns(), from_families(families)
    tested = {name: tested.get(name, {}) | found["types"].get(name, {}) for name in {*tested, *found["types"]}}
    rows = []
    for name in sorted(adapters | found["refused"]):
        outcomes = tested.get(name, {})
        marks = [cell(outcomes.get(column, {})) if name in adapters else "" for column in columns]
        sentences = dict.fromkeys(found["sentences"].get(name, {}).values())
        why = found["refused"].get(name) or " ".join(sentences)
        rows.append([f"`{name}`", adapters.get(name, "refused"), *marks, why])
    clips = 2 + columns.index("clips")
    whole = sum(all(done(found) for i, found in enumerate(row[2:-1], 2) if i != clips) for row in rows)
    counted = (
        f"{len(adapters)} of {len(rows)} types of transformers {found['transformers']} are served, {whole} of them in "
        "every column but clips, which not all types know.\n\n"
    )
    legend = LEGEND.replace("refused: ", "n/a: a test says why there is nothing to test, refused: ").format(**found)
    return counted + markdown(["type", "adapter", *columns, "what is refused"], rows, 2) + f"\n{legend}\n"


def from_families(families: dict) -> dict[str, dict]:
    """Columns of the table of types, of types whose tests the report of families counts."""
    whole = "drop = mask at every step"
    named = {"drop before = mask": whole, "drop between layers = mask": whole}
    return {
        name: {column: tested.get(named.get(column, column), {}) for column in test_columns()}
        for name, tested in families.items()
    }


def cell(counts: dict[str, int]) -> str:
    """A cell of the table of types; a test that is skipped says why there is nothing to test."""
    found = mark(counts)
    return "n/a" if found == NO_TEST and counts.get("skipped") else found


def done(found: str) -> bool:
    """Whether a cell of the table of types shows something that works, or that there is nothing to do."""
    return found.startswith("\N{CHECK MARK}") or found == "n/a"


def test_columns() -> list[str]:
    """The columns of the table of types."""
    return list(runpy.run_path(str(ROOT / "tests" / "support" / "features.py"))["COLUMNS"])


def evidence(tested: dict[str, dict]) -> str:
    """Families x features: the types with an adapter of their own, then what was tested besides."""
    known = [name for name, adapter in known_families().items() if not issubclass(adapter, GenericAdapter)]
    names = [*known, *(name for name in tested if name not in known)]
    columns = runpy.run_path(str(ROOT / "tests" / "support" / "features.py"))["FEATURES"]
    features = [name for name in columns if any(name in found for found in tested.values())]
    rows = [[f"`{name}`", *(mark(tested.get(name, {}).get(feature)) for feature in features)] for name in names]
    return markdown(["family", *features], rows)


def mark(counts: dict[str, int] | None) -> str:
    """A cell: green needs a test that passed and none that failed; a skipped test shows nothing."""
    counts = counts or {}
    if counts.get("failed"):
        return "✗"
    if counts.get("passed"):
        return "✓ / refused" if counts.get("refused") else "✓"
    return "refused" if counts.get("refused") else NO_TEST


def _first_line(adapter: type) -> str:
    text = adapter.__dict__.get("__doc__") or sys.modules[adapter.__module__].__doc__ or ""
    return text.strip().splitlines()[0]


def mini(conditions: dict[str, dict]) -> str:
    """Accuracy of an embedded model under each condition, in percent."""
    names = list(next(iter(conditions.values()))["by_kind"])
    rows = [
        [
            name,
            f"**{100 * found.get('accuracy', found.get('mean')):.1f}**",
            *(f"{100 * found['by_kind'][kind]:.0f}" for kind in names),
        ]
        for name, found in conditions.items()
    ]
    return markdown(["", "all", *names], rows)


def comparison(rows: Sequence[Row]) -> str:
    """The columns of ``vtoken compare``; a star marks what is beyond chance."""
    return tabulated(shown(rows), rows)


def tabulated(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table of rows."""
    lines = [[cell.strip() for cell in line] for line in lines_of(columns, rows)]
    return markdown([column.title for column in columns], lines)


def short(rows: Sequence[Row]) -> str:
    """The unpruned model, and every reducer at a tenth of the tokens."""
    return comparison([row for row in rows if row.keep in (None, 0.1)])


def ranking(rows: Sequence[Row]) -> str:
    """One table for each keep ratio, then one for what has no budget; the best comes first."""
    columns = ["", "reducer", "accuracy %", "vs random", "", "evidence", "tokens, mean over layers"]
    tables = []
    for keep in [*sorted({row.keep for row in rows if row.keep is not None}, reverse=True), None]:
        found = sorted((row for row in rows if row.keep == keep), key=lambda row: -accuracy_of(row))
        lines = [[str(place), *ranked(row)] for place, row in enumerate(found, 1)]
        title = f"keep {keep:g}" if keep is not None else "without a budget"
        tables.append(f"**{title}**\n\n{markdown(columns, lines, text_columns=2)}")
    return "\n" + "\n".join(tables)


def accuracy_of(row: Row) -> float:
    """For sorting: what failed comes last."""
    return row.accuracy.value if row.accuracy else -1.0


def ranked(row: Row) -> list[str]:
    """A row of a ranking."""
    if row.accuracy is None:
        return [row.reducer, "failed", "", "", "", ""]
    versus, verdict = row.versus_random, ""
    if versus is not None and versus.adjusted is not None and versus.adjusted < SIGNIFICANT:
        verdict = "better than chance" if versus.difference.value > 0 else "**worse than chance**"
    elif versus is not None:
        verdict = "as chance"
    evidence = "" if row.evidence_recall is None else f"{100 * row.evidence_recall:.0f} %"
    per_layer = "" if row.visual_per_layer is None else f"{row.visual_per_layer:.1f}"
    return [row.reducer, f"{100 * row.accuracy.value:.1f}", difference_text(versus), verdict, evidence, per_layer]


def note(data: dict) -> str:
    """Questions, versions and machine of a comparison."""
    made, questions = data["made_with"], max(row["documents"] for row in data["rows"])
    machine = made["gpu"] or f"{made['threads']} CPU threads"
    return f"{questions} questions, {machine}, torch {made['torch']}, transformers {made['transformers']}"


def kinds(rows: Sequence[Row]) -> str:
    """Accuracy by kind of question, in percent."""
    return tabulated(kinds_columns(rows), rows)


def table(name: str, results: Path) -> str:
    """The generated text of one block."""
    if name == "reducers":
        return catalogue()
    if name in ("embedded", "again"):
        return {"embedded": embedded, "again": again}[name](results)
    file, _, part = name.partition("/")
    if file == "speed" and part in TABLES:
        return speed(part, results)
    path = results / f"{file}.json"
    if file in ("minis", "repair") and path.is_file():
        return minis(part, json.loads(path.read_text()))
    if part not in ("", "kinds", "note", "ranking", "short", "tried") or not path.is_file():
        raise SystemExit(f"A file asks for table:{name}, but there is no {path} for it.")
    data = json.loads(path.read_text())
    if file == "families":
        return tried(data) if part == "tried" else families(data)
    if name == "types":
        return types(data, json.loads((results / "families.json").read_text())["families"])
    if "conditions" in data:
        return mini(data["conditions"])
    if part == "note":
        return note(data)
    rows = corrected([row_from(row) for row in data["rows"]])
    return {"kinds": kinds, "ranking": ranking, "short": short, "": comparison}[part](rows)


def fill(text: str, results: Path) -> str:
    """A file's text with every block rewritten."""
    if text.count("<!-- table:") != len(BLOCK.findall(text)):
        raise SystemExit("A table is not closed by <!-- /table -->.")
    return BLOCK.sub(lambda block: block[1] + table(block["name"], results) + block[3], text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if README.md is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for path in (root / name for name in FILES if (root / name).is_file()):
        old = path.read_text(encoding="utf-8")
        if (new := fill(old, root / "benchmarks" / "results")) != old:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"{' and '.join(stale)} stale: run python benchmarks/readme_tables.py.\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
