"""Shared by all tests: one thread, so that ranks and reference compute alike, and busy machines stay fair.

By environment variable, before torch is imported, so that tests that need no torch do not wait for it.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
