"""`python -m mms.frontend`: the process of a further front end. It is stopped by the main process, not by signals."""

from __future__ import annotations

import signal
import sys

from mms.allocator import keep_freed_memory
from mms.backend.process import die_with_parent, set_name
from mms.frontend.frontend import main

if __name__ == "__main__":
    die_with_parent()
    set_name("mms-frontend")
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    main(int(sys.argv[1]))
