# SPDX-License-Identifier: Apache-2.0
"""``vtoken demo``: clicked through in a real browser, asked by several at once, and what it refuses to start with."""

import re
import socket
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from typer.testing import CliRunner

from vtoken import mini
from vtoken.cli import app, demo
from vtoken.eval.demo.asking import Asking
from vtoken.eval.demo.page import by_layer
from vtoken.eval.demo.serving import check, serving
from vtoken.mini.documents import held_out

HOST = "127.0.0.1"
PATIENCE = 120_000  # milliseconds


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def asking():
    return Asking("mini-llava", *mini.load("mini-llava"), max_new_tokens=8)


@pytest.fixture(scope="module")
def address(asking):
    with serving(asking, HOST, free_port()) as (address,):
        yield address


@pytest.fixture
def photo(tmp_path):
    """A picture of the user's, and a question about it."""
    document, path = held_out("count", 1)[0], tmp_path / "photo.png"
    Image.fromarray(document.images[0]).save(path)
    return path, document.question


class Screen:
    """What a user sees and does."""

    def __init__(self, page, address):
        self.page = page
        page.set_viewport_size({"width": 1280, "height": 940})
        page.goto(address)
        self.question = page.get_by_label("Question")
        self.unpruned, self.pruned = page.get_by_label("Unpruned"), page.get_by_label(re.compile("Pruned"))

    def ask(self, question=None):
        if question is not None:
            self.question.fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def shows(self, found, tokens):
        """Wait for the line about tokens, and compare both answers."""
        self.page.get_by_text(tokens).wait_for()
        return [self.unpruned.input_value(), self.pruned.input_value()] == [found.unpruned.text, found.pruned.answer]

    def upload(self, path):
        """Put a picture in the place of the one that is there."""
        if self.page.get_by_label("Remove Image").is_visible():
            self.page.get_by_label("Remove Image").click()
        self.page.locator("input[type=file]").first.set_input_files(path)
        self.page.get_by_label("Remove Image").wait_for()

    def refuses(self, words):
        """Wait for a message, and close it."""
        toast = self.page.get_by_test_id("toast-body")
        toast.filter(has_text=words).wait_for()
        self.page.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")


def test_the_demo_in_a_browser(asking, address, photo, page, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=PATIENCE)
    screen, first, (path, question) = Screen(page, address), held_out("attr", 1)[0], photo
    assert screen.question.input_value() == first.question
    bundled = asking.compare(Image.fromarray(first.images[0]), first.question, "idpruner", 0.25)
    screen.ask()
    assert screen.shows(bundled, "36 of 144 tokens")
    page.locator("svg.marks, canvas.marks").wait_for()
    page.screenshot(path=tmp_path / "demo.jpg", quality=85)  # docs/demo.jpg

    page.get_by_label("Reducer").click()
    page.get_by_role("option", name="fastv", exact=True).click()
    page.get_by_text("144 of 144 tokens, 36 behind the last layer").wait_for()
    page.get_by_text("The last token's attention in an early decoder layer.").wait_for()
    slider = page.get_by_role("slider")
    slider.click()  # in the middle
    keep = float(slider.input_value())
    assert 0.4 < keep < 0.6
    page.get_by_text(f"{int(keep * 144)} behind the last layer").wait_for()

    mine = asking.compare(Image.open(path), question, "fastv", keep)
    screen.upload(path)
    screen.question.fill(question)
    screen.question.press("Enter")
    expect(screen.unpruned).to_have_value(mine.unpruned.text)
    assert screen.shows(mine, "behind the last layer")
    page.locator(".gallery-item").nth(1).click()
    expect(screen.question).to_have_value(question)

    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    screen.upload(broken)
    screen.ask()
    screen.refuses("'broken.png' cannot be read as a picture")
    page.get_by_label("Remove Image").click()
    screen.ask()
    screen.refuses("There is no picture: upload one, or pick an example.")
    screen.upload(path)
    screen.ask(" ")
    screen.refuses("There is no question")

    foreign = [event for event in page.events if "://" in event and not event.startswith((address, f"blob:{address}"))]
    assert foreign == [], "nothing is asked of another host"


def test_uploaded_pictures_are_deleted_at_the_end(asking, photo, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(cache))
    with serving(asking, HOST, free_port()) as (address,):
        client = Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
        client.predict(handle_file(photo[0]), photo[1], "random", 0.5, api_name="/ask")
        client.close()
        assert [*cache.rglob("photo.png")]
    assert not [*cache.rglob("photo.png")]


def test_requests_queue(asking, address, photo, monkeypatch):
    path, question = photo
    generate, lock, most = asking.model.generate, threading.Lock(), []

    def slow(*args, **kwargs):
        most.append(lock.acquire(blocking=False))  # False: another is at it
        time.sleep(0.05)
        try:
            return generate(*args, **kwargs)
        finally:
            if most[-1]:
                lock.release()

    expected = [asking.compare(Image.open(path), question, "random", keep) for keep in (0.1, 0.5, 0.9)]
    monkeypatch.setattr(asking.model, "generate", slow)

    def ask(keep):
        client = Client(address, verbose=False)
        return client.predict(handle_file(path), question, "random", keep, api_name="/ask")

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, (0.1, 0.5, 0.9)))
    assert most == [True] * 12  # three times a warm-up and an answer, unpruned and pruned
    for (_, pruned, *_, told), wanted in zip(found, expected, strict=True):
        assert pruned["value"] == wanted.pruned.answer
        assert f"{wanted.pruned.kept} of 144 tokens" in told


def test_the_plot_is_of_all_tokens_in_each_layer():
    frame = by_layer(144, (144, 144, 14))
    assert frame.groupby("layer")["visual tokens"].sum().tolist() == [144] * 3
    assert frame[frame.tokens == "kept"]["visual tokens"].tolist() == [144, 144, 14]


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def last_line(done):
    """On stderr, behind the bars of loading."""
    return done.stderr.splitlines()[-1]


def test_the_command_serves_this_machine_until_it_is_interrupted(monkeypatch, tmp_path):
    """Without telemetry: whatever connects, connects to this machine."""
    port, pages, met = free_port(), [], set()
    connect = socket.socket.connect

    def noted(self, address):
        met.add(address[0])
        return connect(self, address)

    def look():
        pages.append(urllib.request.urlopen(f"http://{HOST}:{port}").read().decode())

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setattr(demo, "until_interrupted", look)
    done = run("--port", port)
    assert done.exit_code == 0, done.output
    assert last_line(done) == f"mini-llava answers at http://{HOST}:{port}/"
    assert done.stdout == ""
    assert "vtoken demo: mini-llava" in pages[0]
    assert met <= {HOST}
    check(HOST, port)  # it is free again


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "nowhere.invalid"], "There is no host 'nowhere.invalid'"),
        (["--host", "192.0.2.1"], "The host '192.0.2.1' is not this machine"),
        (["-m", "mini-lava"], "did you mean 'mini-llava'"),
    ],
)
def test_what_it_cannot_start_with_is_a_sentence(arguments, sentence):
    done = run("--port", free_port(), *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_port_in_use_is_told_before_the_model_is_loaded():
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        done = run("--port", port, "-m", "mini-lava")
    assert done.exit_code == 2
    assert last_line(done) == f"Error: Port {port} of {HOST} is in use: give another one with --port."


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = run("--port", free_port())
    assert done.exit_code == 2
    assert last_line(done) == 'Error: The demo needs gradio, which is not installed: pip install "vtoken[demo]".'


def test_a_link_that_cannot_be_had_is_a_sentence_and_ends_the_server(monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("gradio.networking.setup_tunnel", offline)
    port = free_port()
    done = run("--port", port, "--share")
    assert done.exit_code == 2
    assert last_line(done) == "Error: No public link can be had without the internet: leave out --share."
    check(HOST, port)
