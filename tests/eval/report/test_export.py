# SPDX-License-Identifier: Apache-2.0
"""Markdown and LaTeX tables: names from data are text, numbers stay as they are."""

from vtoken.eval.report.export import as_latex, as_markdown

COLUMNS = ("reducer", "accuracy % [95 % CI]")
LINES = [("a|b_*<i>\\x\nz", "96.2 [94.1, 98.1]"), ("50 % & $x$ #1 {y} ~^", "-1.0*")]


def test_markdown_escapes_names_only():
    head, marks, first, second = as_markdown(COLUMNS, LINES, [True, False]).splitlines()
    assert head == "| reducer | accuracy % [95 % CI] |"
    assert marks == "| --- | ---: |"
    assert first == r"| a\|b\_\*\<i\>\\x z | 96.2 [94.1, 98.1] |"
    assert second == r"| 50 % & $x$ \#1 {y} \~^ | -1.0* |"


def test_latex_escapes_everything():
    text = as_latex(COLUMNS, LINES, [True, False])
    assert r"\begin{tabular}{lr}" in text
    assert r"reducer & accuracy \% [95 \% CI] \\" in text
    assert r"a|b\_*<i>\textbackslash x z & 96.2 [94.1, 98.1] \\" in text
    assert r"50 \% \& \$x\$ \#1 \{y\} \textasciitilde" in text
