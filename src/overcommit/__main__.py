"""`python -m overcommit`: the command line."""

from __future__ import annotations

from overcommit.server.cli import main

if __name__ == "__main__":
    main()
