"""The entry point `python -m trainer`. It checks the rooms first, so nothing of ours may be imported above that."""

import os
import sys

from trainer.guard import guard_rooms

if __name__ == "__main__":
    guard_rooms()
    from trainer.command import leave, main

    leave(main(sys.argv[1:], os.environ))
