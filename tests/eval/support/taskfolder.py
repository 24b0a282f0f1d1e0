# SPDX-License-Identifier: Apache-2.0
"""A folder as a user would write one: an lmms-eval task YAML, its functions and its questions."""

from __future__ import annotations

import json
from pathlib import Path

COLORS = ("red", "green", "blue", "yellow")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_messages: !function utils.messages
doc_to_text: question
doc_to_target: answer
process_results: !function utils.exact
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """\
from PIL import Image


def visual(doc):
    return [Image.new("RGB", (144, 144), doc["answer"])]


def messages(doc):
    image = {"type": "image", "url": visual(doc)[0]}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]


def exact(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"])}
"""


def write_task_folder(folder: Path, *names: str) -> Path:
    """Write a folder that defines tasks of those names, each with a question per color."""
    folder.mkdir(parents=True)
    questions = [{"question": "what color is the square ?", "answer": color} for color in COLORS]
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "utils.py").write_text(FUNCTIONS)
    for name in names:
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "questions.json"))
    return folder
