# SPDX-License-Identifier: Apache-2.0
"""A pruned cache is an object of the user's: whatever transformers lets one do to it works as on an unpruned one.

Oracles: the arithmetic of lengths; the unwrapped model with 4-D masks over the whole sequence (`hidden_reference`); a
fresh cache; and, where features are rewritten, ``backend="mask"``, whose cache holds every column, so that a crop of it
is transformers' own.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import tiny
import torch
from caches import (
    hidden_reference,
    model_of,
    new_cache,
    outcome,
    prefill,
    prompt_of,
    refusal,
    sequence_of,
    steps,
    text,
    turn,
    wrapped,
)
from cases import FEW, REWRITING, pairs
from oracles import ROWWISE, TOLERANCE, built, explicit_masks, generate, visual_and_real
from transformers import StaticCache

import vtoken

BATCHES = {"alone": (1,), "ragged": (1, 2)}
every_case = pytest.mark.parametrize(("family", "name"), pairs())
UNCHANGED = [(family, None) for family in tiny.CORE]
"""The unwrapped model in place of a wrapped one: what shows that a test and its oracle are right."""


def close(found, wanted):
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def everything(inputs):
    """`vtoken.Stats.kept` of a model that keeps all."""
    visual, _ = visual_and_real(inputs)
    edges = visual.int().diff(dim=1, prepend=torch.zeros(len(visual), 1, dtype=torch.int))
    return [(0, torch.ones(int((edges > 0).sum()), visual.shape[1], dtype=torch.bool))]


class Run:
    """A model with a reducer (None: unwrapped) and one prompt."""

    def __init__(self, family, name, batch, **options):
        self.model, self.inputs = model_of(family), prompt_of(family, BATCHES[batch])
        self.prompt, self.rows = sequence_of(self.model, self.inputs), len(BATCHES[batch])
        self.name, self.options = name, options

    def __enter__(self):
        self.context = torch.no_grad() if self.name is None else wrapped(self.model, self.name, **self.options)
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def prefill(self, cache=None):
        return prefill(self.model, self.inputs, cache)

    def kept(self):
        return everything(self.inputs) if self.name is None else vtoken.stats(self.model).kept


# ---------------------------------------------------------------- crop
def lengths_of(inputs):
    """Prompt lengths to crop to, of each kind."""
    visual, _ = visual_and_real(inputs)
    columns = visual.any(0).nonzero()[:, 0]
    first = int(visual[-1].nonzero()[0])
    return {
        "behind": inputs["input_ids"].shape[1] - 3,
        "inside": first + 3,
        "before": int(columns[0]),
        "one token": 1,
        "nothing": 0,
    }


@functools.lru_cache(maxsize=4)
def hidden_by_mask(family, name, batch, length):
    """The turn behind a crop, with ``backend="mask"``."""
    with Run(family, name, batch, backend="mask") as run:
        cache = run.prefill()
        cache.crop(length - run.prompt.ids.shape[1])
        return turn(run.model, run.prompt.before(length), cache, text(run.rows))[0]


def after_a_crop(run, length, generated, kept):
    """What the turn behind a crop to ``length`` has to be, outside of ``run``."""
    before = lengths_of(run.inputs)["before"]
    if run.name in REWRITING and length > before:
        batch = next(name for name, rows in BATCHES.items() if len(rows) == run.rows)
        return hidden_by_mask(run.family, run.name, batch, length)
    return hidden_reference(run.model, run.inputs, kept, generated, length, text(run.rows))


@pytest.mark.parametrize(
    ("batch", "where"),
    [("ragged", "behind"), ("ragged", "inside"), ("ragged", "before"), ("ragged", "nothing"), ("alone", "inside")],
)
@pytest.mark.parametrize(("family", "name"), UNCHANGED + pairs())
def test_crop_into_the_prompt(family, name, batch, where):
    """Length and logits of the next turn are those of an unpruned cache that never held what was cropped."""
    with Run(family, name, batch) as run:
        run.family = family
        cache = run.prefill()
        kept, length = run.kept(), lengths_of(run.inputs)[where]
        cache.crop(length - run.prompt.ids.shape[1])
        left = cache.get_seq_length()
        found, after = turn(run.model, run.prompt.before(length), cache, text(run.rows))
        final = cache.get_seq_length()
    assert left == length
    assert final == after.ids.shape[1]
    close(found, after_a_crop(run, length, text(run.rows, 0), kept))


@pytest.mark.parametrize(("family", "name"), [*UNCHANGED, *pairs(("llava",)), *pairs(tiny.CORE[1:], FEW)])
def test_crop_step_by_step(family, name):
    """Drafts are taken back, then an answer, then the question, the picture and all but one token."""
    wrong = []
    with Run(family, name, "ragged") as run:
        run.family, cache = family, run.prefill()
        kept, generated, size = run.kept(), text(run.rows, 3, 7), run.prompt.ids.shape[1]
        held = steps(run.model, run.prompt, cache, generated)
        targets = [size + 2, size, *(lengths_of(run.inputs)[where] for where in ("behind", "inside", "one token"))]
        found = []
        for target in targets:
            cache.crop(target - cache.get_seq_length())
            wrong += [] if cache.get_seq_length() == target else [f"length {cache.get_seq_length()} for {target}"]
            held = held.before(target)
            found.append(turn(run.model, held, cache, text(run.rows))[0])
            cache.crop(-text(run.rows).shape[1])
    assert not wrong
    for target, logits in zip(targets, found, strict=True):
        if name in REWRITING and target >= size:
            continue  # compared with a fresh cache in the next test
        close(logits, after_a_crop(run, target, generated, kept))


@every_case
def test_crop_of_generated_tokens_gives_the_cache_from_before(family, name):
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
        steps(run.model, run.prompt, cache, text(run.rows, 2, 7))
        cache.crop(-2)
        assert cache.get_seq_length() == run.prompt.ids.shape[1]
        found, _ = turn(run.model, run.prompt, cache, text(run.rows))
    assert torch.equal(found, turn_of(family, name, "ragged", 4))


@pytest.mark.parametrize("name", [None, "uniform", "fastv", "pyramiddrop", "tome"])
def test_crop_to_a_positive_length_is_what_it_is_in_this_transformers(name):
    """An absolute length before 5.14, and a sentence of transformers since: never something else."""
    with Run("llava", name, "alone") as run:
        cache, length = run.prefill(), run.prompt.ids.shape[1]
        if tiny.VERSION >= (5, 14):
            with pytest.raises(ValueError, match="positive value"):
                cache.crop(length - 2)
        else:
            cache.crop(length - 2)
            assert cache.get_seq_length() == length - 2


@pytest.mark.parametrize("name", [None, "uniform", "fastv", "todre", "tome"])
@pytest.mark.parametrize("family", tiny.CORE)
def test_crop_by_more_than_there_is_leaves_nothing(family, name):
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
        cache.crop(-run.prompt.ids.shape[1] - 5)
        assert cache.get_seq_length() == 0
        found, _ = turn(run.model, run.prompt.before(0), cache, text(run.rows))
        wanted, _ = turn(run.model, run.prompt.before(0), new_cache(run.model), text(run.rows))
    close(found, wanted)


@pytest.mark.parametrize("name", [None, "uniform", "fastv", "todre", "tome"])
@pytest.mark.parametrize("family", tiny.CORE)
def test_generate_goes_on_behind_a_crop(family, name):
    """As in a chat whose last message is edited: ``generate`` slices the ids by the cache's own length."""
    with Run(family, name, "alone") as run:
        size, edited = run.prompt.ids.shape[1], text(1, 5)
        cut = {**run.inputs, "input_ids": torch.cat([run.prompt.ids[:, : size - 3], edited], 1)}
        cut["attention_mask"] = torch.ones_like(cut["input_ids"])
        for kind in {"token_type_ids", "mm_token_type_ids"} & cut.keys():
            cut[kind] = torch.cat([cut[kind][:, : size - 3], torch.zeros(1, 5, dtype=cut[kind].dtype)], 1)
        cache = generate(run.model, run.inputs, 3, return_dict_in_generate=True).past_key_values
        cache.crop(size - 3 - cache.get_seq_length())
        tokens = {key: value for key, value in cut.items() if key in ROWWISE}  # the picture is in the cache
        found = generate(run.model, tokens, 4, past_key_values=cache)
        if built(name or "uniform").uses_text:  # the first question chose, so that a fresh run chooses otherwise
            assert cache.get_seq_length() == cut["input_ids"].shape[1] + 3
        else:
            assert torch.equal(found, generate(run.model, cut, 4))


# ---------------------------------------------------------------- reset
def texts_only(rows):
    """A prompt without a picture, of another batch size than the others."""
    return {"input_ids": text(rows, 9, 5), "attention_mask": torch.ones(rows, 9, dtype=torch.long)}


@pytest.mark.parametrize(("family", "name"), UNCHANGED + pairs())
def test_reset_and_another_batch(family, name):
    """A batch of one with other pictures, then three rows of text: as on a new cache."""
    others = [prompt_of(family, (1,), seed=1), texts_only(3)]
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
        steps(run.model, run.prompt, cache, text(run.rows, 1))
        for inputs in others:
            cache.reset()
            assert cache.get_seq_length() == 0
            prompt, ids, answers = sequence_of(run.model, inputs), text(len(inputs["input_ids"])), []
            for used in (cache, new_cache(run.model)):
                prefill(run.model, inputs, used)
                answers.append(turn(run.model, prompt, used, ids)[0])
            assert torch.equal(*answers)
            assert cache.get_seq_length() == prompt.ids.shape[1] + ids.shape[1]


# ---------------------------------------------------------------- rows
TOKENS = {1: text(2, 1, 20), 4: text(2, 4, 21)}


@functools.lru_cache(maxsize=8)
def turns_of(family, name, length):
    """Two texts x rows: the logits of each text on each row of an untouched cache."""
    out = []
    with Run(family, name, "ragged") as run:
        for words in TOKENS[length]:
            out.append(turn(run.model, run.prompt, run.prefill(), words.expand(2, -1))[0])
    return out


ARRANGEMENTS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0], [0, 1]),
    "reorder to one beam": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1], [0, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1], [0, 1, 0, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], [0]),
    "select in another order": (
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])),
        [1, 0, 1],
        [0, 0, 1],
    ),
}


@pytest.mark.parametrize(
    ("family", "name", "length"),
    [(*pair, 1) for pair in UNCHANGED + pairs()] + [(*pair, 4) for pair in pairs(("llava", "qwen2_5_vl"))],
)
def test_arrangements_of_rows(family, name, length):
    """Each row goes on as it does in the cache that was not touched."""
    wrong, table = {}, turns_of(family, name, length)
    for what, (change, rows, words) in ARRANGEMENTS.items():
        try:
            with Run(family, name, "ragged") as run:
                cache = run.prefill()
                change(cache)
                found, _ = turn(run.model, run.prompt.rows(rows), cache, TOKENS[length][words])
            close(found, torch.stack([table[word][row] for row, word in zip(rows, words, strict=True)]))
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong[what] = f"{type(error).__name__}: {error}"
    assert not wrong


@pytest.mark.parametrize(("family", "name"), pairs(reducers=FEW))
def test_a_selected_row_can_be_cropped(family, name):
    """Row 0 alone, without its neighbour, back to the text before its picture."""
    with Run(family, name, "ragged") as run:
        cache, length = run.prefill(), int(visual_and_real(run.inputs)[0][0].nonzero()[0])
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(length - run.prompt.ids.shape[1])
        assert cache.get_seq_length() == length
        found, _ = turn(run.model, run.prompt.rows([0]).before(length), cache, text(1))
        kept = run.kept()
    wanted = hidden_reference(run.model, run.inputs, kept, text(2, 0), length, text(1).expand(2, -1))
    close(found, wanted[:1])


# ---------------------------------------------------------------- copies
def saved_and_loaded(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved_and_loaded,
    "a copy of a copy": lambda cache: copy.deepcopy(saved_and_loaded(cache)),
}


@pytest.mark.parametrize(
    ("family", "name", "batch"),
    [(*pair, "ragged") for pair in UNCHANGED + pairs()] + [(*pair, "alone") for pair in pairs(reducers=FEW)],
)
def test_copies_go_on_as_the_original(family, name, batch):
    """Bit for bit, and what is done to a copy does not reach the original."""
    with Run(family, name, batch) as run:
        cache = run.prefill()
        held = steps(run.model, run.prompt, cache, text(run.rows, 1, 7))
        copies = {what: make(cache) for what, make in COPIES.items()}
        copies["deepcopy"].reset()
        copies["deepcopy"] = copy.deepcopy(cache)
        found = {what: turn(run.model, held, twin, text(run.rows))[0] for what, twin in copies.items()}
        lengths = {twin.get_seq_length() for twin in copies.values()}
        assert cache.get_seq_length() == held.ids.shape[1]
        wanted, after = turn(run.model, held, cache, text(run.rows))
    assert lengths == {after.ids.shape[1]}
    assert [what for what, logits in found.items() if not torch.equal(logits, wanted)] == []


@pytest.mark.parametrize(("family", "name"), pairs(("llava", "qwen2_5_vl"), FEW))
def test_a_shallow_copy(family, name):
    """It shares its layers, as an unpruned one does; what is known of them must come along."""
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
        wanted, _ = turn(run.model, run.prompt, copy.deepcopy(cache), text(run.rows))
        found, _ = turn(run.model, run.prompt, copy.copy(cache), text(run.rows))
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------- other models and reducers
@functools.lru_cache(maxsize=4)
def turn_of(family, name, batch, length):
    """The turn where nothing was done to model or cache."""
    with Run(family, name, batch) as run:
        return turn(run.model, run.prompt, run.prefill(), text(run.rows, length))[0]


@pytest.mark.parametrize(("batch", "length"), [("alone", 1), ("alone", 4), ("ragged", 4)])
@every_case
def test_a_pruned_cache_on_the_unwrapped_model(family, name, batch, length):
    """The same logits, or a sentence; for one row whose layers hold the same columns it has to work."""
    with Run(family, name, batch) as run:
        cache = run.prefill()
    plain = batch == "alone" and len({layer.keys.shape[2] for layer in cache.layers}) == 1
    with torch.no_grad():
        found, error = outcome(lambda: turn(run.model, run.prompt, cache, text(run.rows, length)))
    if error is not None:
        assert refusal(error), f"{type(error).__name__}: {error}"
        assert not plain, f"one row, and all layers hold the same columns: {error}"
        return
    close(found[0], turn_of(family, name, batch, length))
    assert cache.get_seq_length() == found[1].ids.shape[1]


@pytest.mark.parametrize("name", ["uniform", "divprune", "tome"])
@pytest.mark.parametrize("family", tiny.CORE)
def test_generate_on_the_unwrapped_model(family, name):
    """A chat goes on after ``unwrap``: the ids are those of the wrapped model."""
    answers = []
    for stays in (True, False):
        with Run(family, name, "alone") as run:
            first = generate(run.model, run.inputs, 3, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, text(1)], 1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if stays:
                answers.append(generate(run.model, more, 4, past_key_values=first.past_key_values))
    answers.append(generate(run.model, more, 4, past_key_values=first.past_key_values))
    assert torch.equal(*answers)


def elsewhere(how, model, name):
    """(model, reducer, keep) on which a cache goes on."""
    other = "uniform" if name == "fastv" else "fastv"
    return {
        "another reducer": (model, other, 0.25),
        "another keep": (model, "uniform", 0.9),
        "nothing reduced": (model, "uniform", 1.0),
        "another cut before": (model, "divprune", 0.2),
        "a copy of the model": (copy.deepcopy(model), other, 0.5),
    }[how]


HOWS = ["another reducer", "another keep", "nothing reduced", "another cut before", "a copy of the model"]


@pytest.mark.parametrize(
    ("family", "name", "how"),
    [(*pair, how) for pair in pairs(reducers=FEW) for how in HOWS] + [(*pair, HOWS[0]) for pair in pairs()],
)
def test_a_pruned_cache_under_another_reducer(family, name, how):
    """Text goes on as under the first reducer, which has done all that there was to do."""
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
    model, other, keep = elsewhere(how, run.model, name)
    with wrapped(model, other, keep):
        found, _ = turn(model, run.prompt, cache, text(run.rows))
    assert torch.equal(found, turn_of(family, name, "ragged", 4))


@pytest.mark.parametrize(("family", "name"), pairs(reducers=FEW))
def test_a_deepcopied_wrapped_model_goes_on(family, name):
    """The copy of a wrapped model is wrapped itself."""
    with Run(family, name, "ragged") as run:
        cache = run.prefill()
        twin = copy.deepcopy(run.model)
        found, _ = turn(twin, run.prompt, cache, text(run.rows))
    assert torch.equal(found, turn_of(family, name, "ragged", 4))


@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop", "tome"])
@pytest.mark.parametrize("family", tiny.CORE)
def test_an_unpruned_cache_of_before_the_wrap(family, name):
    """Text on a cache that the unwrapped model filled: nothing is pruned any more."""
    model, inputs = model_of(family), prompt_of(family, (1, 2))
    prompt = sequence_of(model, inputs)
    with torch.no_grad():
        cache = prefill(model, inputs)
        wanted, _ = turn(model, prompt, copy.deepcopy(cache), text(2))
    with wrapped(model, name):
        found, _ = turn(model, prompt, cache, text(2))
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------- static caches


def static_prompts(family):
    """One row each: a long prompt, then a text, then other pictures."""
    return [prompt_of(family, (2,)), texts_only(1), prompt_of(family, (1,), seed=1), prompt_of(family, (1,))]


@pytest.mark.parametrize("way", ["cache_implementation", "reset"])
@pytest.mark.parametrize("name", [None, *FEW])
@pytest.mark.parametrize("family", tiny.CORE)
def test_a_static_cache_for_several_prompts(family, name, way):
    """``generate`` keeps its static cache between calls, and a user resets one: as with new ones."""
    model = copy.deepcopy(model_of(family))
    context = torch.no_grad() if name is None else wrapped(model, name)
    with context:
        wanted = [generate(model, inputs, 3) for inputs in static_prompts(family)]
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
        for inputs, ids in zip(static_prompts(family), wanted, strict=True):
            options = {"cache_implementation": "static"}
            if way == "reset":
                cache.reset()
                options = {"past_key_values": cache}
            assert torch.equal(generate(model, inputs, 3, **options), ids)


# ---------------------------------------------------------------- sliding windows
def right_or_refused(run, wanted):
    """``run()`` gives ``wanted``, or a sentence."""
    found, error = outcome(run)
    if error is None:
        close(found, wanted)
    else:
        assert refusal(error), f"{type(error).__name__}: {error}"


def sliding_run(window):
    model = model_of("gemma3", window=window)
    inputs = prompt_of("gemma3", (1, 2))
    return model, inputs, sequence_of(model, inputs)


SLIDING_NAMES = ["uniform", "divprune", "tome", "fastv", "pyramiddrop", "todre"]
sliding = pytest.mark.parametrize("window", [14, 200])
every_sliding = pytest.mark.parametrize("name", [None, *SLIDING_NAMES])


def sliding_context(model, name):
    return torch.no_grad() if name is None else wrapped(model, name)


@pytest.mark.parametrize("length", [1, 4], ids=["a step", "a turn"])
@sliding
@every_sliding
def test_sliding_windows_copies_and_rows(name, window, length):
    """A window that is shorter and one that is longer than the prompt."""
    model, inputs, prompt = sliding_run(window)
    with sliding_context(model, name):
        tables = []
        for words in TOKENS[length]:
            right = functools.partial(turn, model, prompt, ids=words.expand(2, -1))
            found, error = outcome(lambda: right(cache=prefill(model, inputs)))
            if error is not None:
                assert (name, window, length) != (None, 200, 4)
                assert refusal(error), f"{type(error).__name__}: {error}"
                return
            tables.append(found[0])
        for make in COPIES.values():
            twin = make(prefill(model, inputs))
            right_or_refused(lambda: right(cache=twin)[0], tables[1])
        for change, rows, words in ARRANGEMENTS.values():
            cache = prefill(model, inputs)
            change(cache)
            arranged = torch.stack([tables[word][row] for row, word in zip(rows, words, strict=True)])
            right_or_refused(lambda: turn(model, prompt.rows(rows), cache, TOKENS[length][words])[0], arranged)


@sliding
@every_sliding
def test_sliding_windows_reset(name, window):
    model, inputs, _ = sliding_run(window)
    with sliding_context(model, name):
        for other in (prompt_of("gemma3", (1,), seed=1), texts_only(3)):
            cache = prefill(model, inputs)
            cache.reset()
            assert cache.get_seq_length() == 0
            ids, answers = text(len(other["input_ids"]), 1), []
            for used in (cache, new_cache(model)):
                prefill(model, other, used)
                answers.append(turn(model, sequence_of(model, other), used, ids)[0])
            assert torch.equal(*answers)


@sliding
@every_sliding
def test_sliding_windows_crop_before_the_picture(name, window):
    """Right, or a sentence: transformers itself refuses to crop a layer whose window is full."""
    model, inputs, prompt = sliding_run(window)
    length = lengths_of(inputs)["before"]

    def cropped():
        cache = prefill(model, inputs)
        cache.crop(length - prompt.ids.shape[1])
        assert cache.get_seq_length() == length
        return turn(model, prompt.before(length), cache, text(2))[0]

    before = {"input_ids": prompt.ids[:, :length], "attention_mask": prompt.mask[:, :length]}
    with torch.no_grad():
        wanted, _ = turn(model, prompt.before(length), prefill(model, before), text(2))
    with sliding_context(model, name):
        if window == 200 and name is None:
            close(cropped(), wanted)
        right_or_refused(cropped, wanted)


@pytest.mark.parametrize("length", [1, 4], ids=["a step", "a turn"])
@sliding
@pytest.mark.parametrize("name", SLIDING_NAMES)
def test_sliding_windows_on_the_unwrapped_model(name, window, length):
    model, inputs, prompt = sliding_run(window)
    with wrapped(model, name):
        cache = prefill(model, inputs)
        try:
            wanted, _ = turn(model, prompt, prefill(model, inputs), text(2, length))
        except NotImplementedError:
            wanted = None
    with torch.no_grad():
        if wanted is None:  # a further turn is not defined under vtoken, so that only a sentence is right
            with pytest.raises(RuntimeError) as found:
                turn(model, prompt, cache, text(2, length))
            assert refusal(found.value), found.value
        else:
            right_or_refused(lambda: turn(model, prompt, cache, text(2, length))[0], wanted)


def test_the_oracle_sees_what_is_hidden():
    """Hiding one more column changes the answer: the reference is no constant."""
    model, inputs = model_of("llava"), prompt_of("llava")
    ids, kept = text(1), everything(inputs)
    first = hidden_reference(model, inputs, kept, text(1, 0), 20, ids)
    fewer = [(0, kept[0][1].clone())]
    fewer[0][1][0, 1] = False
    assert not torch.allclose(first, hidden_reference(model, inputs, fewer, text(1, 0), 20, ids))
    later = [*kept, (3, fewer[0][1])]
    assert not torch.allclose(first, hidden_reference(model, inputs, later, text(1, 0), 20, ids))
    length = inputs["input_ids"].shape[1]
    with explicit_masks(model, lambda layer: torch.ones(1, length, length).tril().bool()), torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
