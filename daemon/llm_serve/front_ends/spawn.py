"""What the fork server runs: apart from the front end itself, for the daemon to name it without loading it."""

from __future__ import annotations

import socket

from llm_serve.front_ends.birth import Birth


def live(birth: Birth, listener: socket.socket, connection: socket.socket, board: int) -> None:
    """The whole life of a front end, in a fork of the fork server, which has loaded it."""
    from llm_serve.front_ends import front_end

    front_end.main(birth, listener, connection, board)
