# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md come from committed results."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import vtoken
from vtoken.eval.comparison.statistics import Estimate, Paired
from vtoken.eval.comparison.summary import Row

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "readme_tables.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec.loader.exec_module(module)
    return module


def outcomes(**counts):
    return {"passed": 0, "failed": 0, "skipped": 0, "refused": 0, **counts}


@pytest.fixture
def project(tmp_path):
    """A README with all kinds of tables and one committed result."""
    common = {"cell": "x", "model": "m", "task": "mini", "documents": 320, "kinds": {"color": 0.9, "digit": 0.8}}
    rows = [
        Row(**common, reducer="unpruned", keep=None, accuracy=Estimate(0.9, 0.85, 0.93), retained=1.0),
        Row(
            **common,
            reducer="fopru | row",
            keep=0.25,
            accuracy=Estimate(0.8, 0.75, 0.85),
            versus_unpruned=Paired(Estimate(-0.1, -0.15, -0.05), 0.0004, 40, 8),
            retained=0.889,
            visual_kept=36.0,
            visual_per_layer=30.0,
            versus_random=Paired(Estimate(-0.2, -0.3, -0.1), 0.001, 40, 8),
            evidence_recall=0.5,
            speedup=1.8,
        ),
    ]
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    made = {"gpu": None, "threads": 2, "torch": "2.15", "transformers": "5.23"}
    (results / "compare.json").write_text(json.dumps({"rows": [asdict(row) for row in rows], "made_with": made}))
    blind = {"accuracy": 0.3, "by_kind": {"color": 0.2, "digit": 0.1}}
    (results / "mini_llava.json").write_text(json.dumps({"conditions": {"blind": blind}}))
    counts = {
        "llava": {"beams": outcomes(passed=2), "clips": outcomes(passed=3, failed=1), "PEFT": outcomes(skipped=1)},
        "llava_next": {"beams": outcomes(passed=1, refused=1), "clips": outcomes(refused=1), "PEFT": outcomes()},
    }
    versions = {"python": "3.11", "torch": "2.15", "transformers": "5.23"}
    (results / "families.json").write_text(json.dumps({"versions": versions, "families": counts}))
    names = ("compare", "compare/kinds", "compare/ranking", "reducers", "families", "mini_llava", "speed/gpu")
    blocks = "".join(f"<!-- table:{name} -->\nold\n<!-- /table -->\n" for name in names)
    blocks += "(<!-- table:compare/note -->old<!-- /table -->)\n"
    (tmp_path / "README.md").write_text("# Title\n" + blocks + "The end.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "findings.md").write_text("<!-- table:compare/note -->old<!-- /table -->\n")
    return tmp_path


def test_writes_all_tables_and_nothing_else(script, project):
    assert script.main([], project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert "old" not in text
    assert r"| fopru \| row | 0.25 | 80.0 [75.0, 85.0] | -10.0* | <0.001 | 88.9 % | -20.0* | 36.0 (30.0) |" in text
    assert "| unpruned |  | 90 | 80 |" in text
    assert "| 1 | fopru \\| row | 80.0 | -20.0* | **worse than chance** | 50 % | 30.0 |" in text
    assert "old" not in (project / "docs" / "findings.md").read_text()
    assert "| blind | **30.0** | 20 | 10 |" in text
    assert "| `llava`, `vipllava` |" in text
    assert "| family | beams | clips | PEFT |" in text
    none = script.NO_TEST
    assert f"| `llava` | ✓ | ✗ | {none} |" in text, "green needs a pass and no failure"
    assert f"| `llava_next` | ✓ / refused | refused | {none} |" in text
    assert f"| `vipllava` | {none} | {none} | {none} |" in text, "served, but not tested"
    assert "transformers 5.23, torch 2.15" in text
    assert "Not measured on a GPU yet: `python benchmarks/gpu_all.py` does it." in text
    assert (
        "(<!-- table:compare/note -->320 questions, 2 CPU threads, torch 2.15, transformers 5.23<!-- /table -->)"
        in text
    )
    assert all(f"| `{name}` |" in text for name in vtoken.list_reducers())


def test_every_type_has_a_row(script):
    report = {
        "transformers": "5.23",
        "torch": "2.15",
        "types": {"llama4": {"beams": {"skipped": 1}, "clips": {"passed": 1}, "static cache": {"refused": 1}}},
        "sentences": {"llama4": {"static cache": "It attends in chunks."}},
        "refused": {"blip": "It reads by cross attention."},
    }
    text = script.types(
        report, {"llava": {"drop = mask at every step": outcomes(passed=2), "beams": outcomes(failed=1)}}
    )
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = {line.split()[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    columns = ["adapter", *script.test_columns(), "why"]
    assert dict(zip(columns, rows["`llama4`"], strict=True)) == {
        **dict.fromkeys(columns, script.NO_TEST),
        "adapter": "`llama4.py`",
        "beams": "n/a",
        "clips": "✓",
        "static cache": "refused",
        "why": "It attends in chunks.",
    }
    llava = dict(zip(columns, rows["`llava`"], strict=True))
    assert (llava["drop before = mask"], llava["drop between layers = mask"], llava["beams"]) == ("✓", "✓", "✗")
    assert rows["`blip`"] == ["refused", *[""] * 11, "It reads by cross attention."]
    assert f"{len(rows) - 1} of {len(rows)} types" in text


def test_check_tells_fresh_from_stale(script, project, capsys):
    assert script.main(["--check"], project) == 1
    assert "stale" in capsys.readouterr().err
    assert "old" in (project / "README.md").read_text()
    script.main([], project)
    assert script.main(["--check"], project) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("<!-- table:nowhere -->\n<!-- /table -->", "nowhere"), ("<!-- table:reducers -->\n", "not closed")],
)
def test_impossible_tables(script, project, text, sentence):
    (project / "README.md").write_text(text)
    with pytest.raises(SystemExit, match=sentence):
        script.main([], project)


def test_the_readme_of_this_project_is_fresh(script):
    results = script.ROOT / "benchmarks" / "results"
    if not all(
        (results / f"{name}.json").is_file() for name in ("compare", "all", "mini_llava", "mini_llava_next", "families")
    ):
        pytest.skip("nothing measured yet")
    assert script.main(["--check"]) == 0
