"""Connects and asks, again and again, until told to stop; then prints what it saw as JSON.

Run as a program, in the network of the machine under test: python connect_loop.py URL_HOST PORT STOP_FILE
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """A new connection for every question, as impatient clients have it."""
    host, port, stop = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    seen: dict[str, int] = {}
    longest_s = 0.0
    while not stop.exists():
        began = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        try:
            connection.request("GET", "/livez")
            answer = str(connection.getresponse().status)
        except OSError as error:
            answer = type(error).__name__
        except http.client.HTTPException as error:
            answer = type(error).__name__
        finally:
            connection.close()
        seen[answer] = seen.get(answer, 0) + 1
        longest_s = max(longest_s, time.monotonic() - began)
        time.sleep(0.005)
    print(json.dumps({"answers": seen, "longest_s": round(longest_s, 3)}))


if __name__ == "__main__":
    main()
