# SPDX-License-Identifier: Apache-2.0
"""The reference is complete, notebooks are committed without outputs, and the checks of wheel and site find faults.

That the site builds, its links lead somewhere and its notebooks run is shown by building it (``.ci/run``).
"""

import json
import runpy
import zipfile
from pathlib import Path

import pytest

import vtoken
from vtoken import ops, reducers

ROOT = Path(__file__).resolve().parent.parent
AUTOMATIC = "automodule:: vtoken.reducers", "automodule:: vtoken.ops"
"""Modules all of whose public names are documented without being named."""


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert all(module in text for module in AUTOMATIC)
    listed, named = text.split("exclude-members: ")[1].splitlines()[0].split(", "), set(vtoken.__all__)
    automatic = set(reducers.__all__) - set(listed)
    missing = [name for name in named - automatic if f":: vtoken.{name}\n" not in text]
    assert missing == []
    assert all(getattr(module, name).__doc__ for module in (reducers, ops) for name in module.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("page.html", '<a href="https://elsewhere.org">x</a><script src="own.js"></script>', ""),
        ("page.html", '<script src="//elsewhere.org/x.js"></script>', "page.html fetches //elsewhere.org/x.js\n"),
        ("page.html", '<link rel="stylesheet" href="https://a.b/c.css">', "page.html fetches https://a.b/c.css\n"),
        ("page.html", '<img src="https://a.b/c.png">', "page.html fetches https://a.b/c.png\n"),
        ("style.css", "@import url('https://a.b/font.css');", "style.css fetches https://a.b/font.css\n"),
        ("style.css", "@font-face { src: url(https://a.b/c.woff2) }", "style.css fetches https://a.b/c.woff2\n"),
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_found(name, content, found, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    main = runpy.run_path(str(ROOT / ".ci" / "check_site.py"))["main"]
    assert main(str(tmp_path)) == bool(found)
    assert capsys.readouterr().err == found


@pytest.mark.parametrize(
    ("more", "less", "found"),
    [
        ([], [], ""),
        (["tests/test_docs.py"], [], "has no place in it: tests/test_docs.py"),
        ([], ["vtoken/py.typed"], "missing: vtoken/py.typed"),
        ([], ["vtoken-1.dist-info/licenses/LICENSE"], "missing: licenses/LICENSE"),
    ],
)
def test_what_a_wheel_lacks_or_holds_too_much_is_found(more, less, found, tmp_path, capsys):
    script = runpy.run_path(str(ROOT / ".ci" / "check_wheel.py"))
    names = {*script["wanted"](), "vtoken-1.dist-info/licenses/LICENSE", *more} - {*less}
    assert {"vtoken/eval/report/templates/report.html.j2", "vtoken/configs/reducers/fopru-row.yaml"} < names
    with zipfile.ZipFile(tmp_path / "vtoken-1-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "")
    assert script["main"](archive.filename) == bool(found)
    assert capsys.readouterr().err == (f"vtoken-1-py3-none-any.whl: {found}\n" if found else "")
