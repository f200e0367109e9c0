"""Several processes that answer HTTP for one engine: `[server] front_ends`.

- `pool.py` lives in the daemon's own process, the first one: it has the others forked, says to them what the supervisor
  and the engine room decide, and replaces those that die;
- `protocols.py` is what these two take the pool for: a gate, and those who share the engine;
- `front_end.py` is the whole of another process, `spawn.py` its way in, `birth.py` what it begins with;
- `messages.py` is what goes over the pipe between them, orders out and facts in;
- `turns.py` is what all of them, the first one included, do again and again with the board (host/board.py), on which
  the numbers stand that change all the time;
- `totals.py` makes one instance's metrics of all of theirs.

Imports go down this list, from the pool and from a front end, and neither of these two imports the other. What is
decided from numbers alone is in the core: company.py and tally.py.
"""
