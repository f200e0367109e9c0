"""Several processes that answer HTTP for one engine: `[server] front_ends`.

`pool.py` lives in the daemon's own process, the first one. It has the others forked, says to them what the supervisor
and the engine room decide, and is to these what one gate and one engine's client would be (`protocols.py`).
`front_end.py` is the whole of another process. It begins with what `birth.py` holds; from then on orders come in and
facts go out as `messages.py` has them. Numbers that change all the time stand on the board instead (host/board.py), at
which each process looks in its turns (`turns.py`). `totals.py` makes one instance's metrics of all of theirs.

What is decided from numbers alone is in the core: tally.py and company.py.
"""
