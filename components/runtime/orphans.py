"""A rank must not outlive its launcher: two jobs would then write to one folder once the user starts again.

So it is killed. SIGTERM would have it save first, for as long as `checkpoint.grace_seconds`, beside the job that has
been started again, and over a store that has died with the launcher.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

LAUNCHER = "ESPALIER_LAUNCHER"
"""Variable that tells ranks the process id of their launcher: it may die before they can ask who started them."""
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def end_with_parent(environ: Mapping[str, str]) -> None:
    """Let the kernel kill this process when its parent dies, however it dies. Linux only; elsewhere a no-op."""
    if sys.platform != "linux":
        return
    parent = int(environ.get(LAUNCHER) or os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
