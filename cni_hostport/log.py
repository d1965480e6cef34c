"""Lines for the operator: what a log is, and lines that go to syslog as well."""

from __future__ import annotations

from cni_hostport.text import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Log = Callable[[str], None]
    """Writes one line to wherever this call's messages go."""


COPIES: list[Log] = []  # where else announcements go


def announce(log: Log, line: str) -> None:
    """Tell the operator, who may not see the stderr of a plugin that succeeded: write a line to the log and syslog."""
    import syslog

    for write in (log, *COPIES):
        write(line)
    syslog.openlog("hostport", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, escaped(line))
