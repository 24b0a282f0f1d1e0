# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite, and reports as JSON: what the tests show about each family (``--families-report``), and
about each image-text-to-text type of transformers (``--types-report``, which runs only the tests that say something).
"""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from features import COLUMNS, FEATURE_OF, FEATURES, KINDS, OUTCOMES, column_of
from transformers import CONFIG_MAPPING

torch.set_num_threads(1)  # the suite runs in one process per core


def pytest_addoption(parser):
    # a string: pytest-xdist sends the options to its workers, and cannot send a Path
    parser.addoption("--families-report", metavar="PATH", help="write the outcomes by family and feature as JSON")
    parser.addoption("--types-report", metavar="PATH", help="write the outcomes by model type and column as JSON")


def pytest_configure(config):
    for option, report in (("families_report", FamiliesReport), ("types_report", TypesReport)):
        path = config.getoption(option)
        if path and not hasattr(config, "workerinput"):  # under pytest-xdist: only where all reports arrive
            config.pluginmanager.register(report(Path(path)))


def pytest_collection_modifyitems(config, items):
    """Family and feature travel with the reports of a test, also from the workers of pytest-xdist."""
    if config.getoption("types_report"):
        said = [item for item in items if said_of_a_type(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in {*said}])
        items[:] = said
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        feature = FEATURE_OF.get(getattr(item, "originalname", item.name))
        if family:
            item.user_properties += [("family", family), ("feature", feature)]
        if kind := KINDS.get(item.path.stem):
            reducer = getattr(item, "callspec", None) and item.callspec.params.get("name")
            item.user_properties += [("kind", kind), ("reducer", reducer if isinstance(reducer, str) else None)]


def said_of_a_type(item) -> bool:
    """Whether a test is evidence for the table of types; if so, the column travels with its reports."""
    name = getattr(item, "originalname", item.name)
    if name == REFUSAL:
        return True
    params = item.callspec.params if hasattr(item, "callspec") else {}
    column = column_of(name, params) if params.get("family") in CONFIG_MAPPING else None
    if column:
        item.user_properties += [("type", params["family"]), ("column", column)]
    return column is not None


REFUSAL = "test_the_rest_is_refused_with_the_reason_that_the_table_gives"
"""The test that records why a type is refused."""


class OutcomesReport:
    """Counts outcomes by row and column; a test counts once, and as failed if any of its phases failed."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, tuple[str, str, str]] = {}

    def note(self, report, row: str | None, column: str | None) -> None:
        """Count a phase of a test as evidence for a cell; its property ``refused`` says that a sentence was right."""
        failed_before = self.outcomes.get(report.nodeid, ("", "", ""))[2] == "failed"
        if not row or not column or failed_before or (report.when != "call" and report.passed):
            return
        refused = report.passed and "refused" in dict(report.user_properties)
        self.outcomes[report.nodeid] = (row, column, "refused" if refused else report.outcome)

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # an interrupted run says nothing about the tests that it did not reach
        counts: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
        for row, column, outcome in self.outcomes.values():
            counts[row][column][outcome] += 1
        text = json.dumps(self.content(dict(sorted(counts.items()))), indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


class TypesReport(OutcomesReport):
    """By type and column, with the sentences with which something is refused."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.sentences: dict[str, dict[str, str]] = defaultdict(dict)
        self.refused: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        if "unserved" in found and report.when == "call" and report.passed:
            self.refused[found["unserved"]] = found["sentence"]
        if "column" not in found:
            return
        if report.when == "call" and report.passed and "refused" in found:
            self.sentences[found["type"]][found["refused"]] = found["sentence"]
        self.note(report, found["type"], found.get("refused", found["column"]))

    def content(self, counts) -> dict:
        types = {
            name: {column: dict(found[column]) for column in COLUMNS if column in found}
            for name, found in counts.items()
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {**versions, "types": types, "sentences": dict(sorted(self.sentences.items()))}
        return {**report, "refused": dict(sorted(self.refused.items()))}


class FamiliesReport(OutcomesReport):
    """By family and feature, and how many cases of each kind of fault passed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.cases: dict[str, tuple[str, str | None, str | None]] = {}  # of kinds: those that passed

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        if "kind" in found and report.when == "call" and report.passed:
            self.cases[report.nodeid] = found["kind"], found.get("family"), found["reducer"]
        self.note(report, found.get("family"), found.get("refused") or found.get("feature"))

    def content(self, counts) -> dict:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        families = {
            family: {name: {what: found[name][what] for what in OUTCOMES} for name in FEATURES if name in found}
            for family, found in counts.items()
        }
        return {
            "versions": versions,
            "kinds": {kind: self.tried(kind) for kind in KINDS.values()},
            "families": families,
        }

    def tried(self, kind: str) -> dict:
        """How many cases of a kind passed: in all, by family and by reducer."""
        cases = [(family, reducer) for one, family, reducer in self.cases.values() if one == kind]
        families, reducers = (Counter(case[i] for case in cases if case[i]) for i in (0, 1))
        return {
            "cases": len(cases),
            "families": dict(sorted(families.items())),
            "reducers": dict(sorted(reducers.items())),
        }
