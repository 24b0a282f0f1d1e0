# SPDX-License-Identifier: Apache-2.0
"""The demo's server: where it listens, what is left when it ends. It must not know models or reducers."""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vtoken.eval.errors import EvalError, MissingExtraError

if TYPE_CHECKING:
    from vtoken.eval.demo.asking import Asking


def check(host: str, port: int) -> None:
    """Refuse what cannot be served; it takes less time than loading a model.

    Raises
    ------
    MissingExtraError
        If Gradio is not installed.
    EvalError
        If the address cannot be listened on.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("The demo", "gradio", "demo") from error
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise EvalError(f"There is no host {host!r}: give an address of this machine with --host.") from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except OSError as error:
            raise EvalError(_refusal(host, port, error)) from error


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use: give another one with --port."
    if error.errno == errno.EACCES:
        return f"Port {port} of {host} may not be opened by this user: give one above 1023 with --port."
    return f"The host {host!r} is not this machine ({error.strerror}): give an address of it with --host."


@contextlib.contextmanager
def serving(asking: Asking, host: str, port: int, *, share: bool = False) -> Iterator[list[str]]:
    """Serve the demo while entered; pictures that were uploaded are deleted at the end.

    Parameters
    ----------
    asking : Asking
        Who answers.
    host, port : str, int
        Where to listen.
    share : bool
        Whether Gradio's makers tunnel a public address to it.

    Yields
    ------
    list of str
        Addresses of the page.

    Raises
    ------
    EvalError
        If no public address can be had.
    """
    from vtoken.eval.demo.page import THEME, build

    with tempfile.TemporaryDirectory() as folder:
        page = build(asking, Path(folder))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # its remarks, which are no results
                _, local, public = page.launch(
                    server_name=f"[{host}]" if ":" in host else host,
                    server_port=port,
                    share=share,
                    theme=THEME,
                    prevent_thread_lock=True,
                    show_error=True,
                    quiet=True,
                    ssr_mode=False,  # would need Node
                    inline=False,
                    footer_links=["settings"],
                )
            if share and not public:
                raise EvalError("No public link can be had without the internet: leave out --share.")
            yield [address for address in (local, public) if address]
        finally:
            page.close(verbose=False)
