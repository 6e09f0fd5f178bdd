"""Run a command that ends when its parent does: `launch.py PARENT SIGNAL IDENTITY COMMAND...`.

A program of its own rather than a `preexec_fn`, because code between fork and exec may deadlock
in a process that has threads, and test suites have threads. It changes itself, then becomes
COMMAND under the same process id.

PARENT is the process id to outlive no longer than, SIGNAL the number the kernel sends us then.
IDENTITY is who COMMAND runs as: `same`; `namespace`, which looks like an ordinary user to
COMMAND and still owns root's files; or the name of a user.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
ORDINARY_ID = 1000
"""Any number but 0 will do: it exists only inside the namespace."""


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def enter_namespace() -> None:
    """Look like an ordinary user, in a user namespace whose one user is the one we are.

    PostgreSQL refuses to run as root, by looking at its user id. Here it sees 1000, while its
    files stay root's, in whatever private folder they lie: no second user, no chown.
    """
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{ORDINARY_ID} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{ORDINARY_ID} {gid} 1")


def become_user(name: str) -> None:
    user = pwd.getpwnam(name)
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def main(arguments: list[str]) -> None:
    parent, orphan_signal, identity, *command = arguments
    if identity == "namespace":
        enter_namespace()
    elif identity != "same":
        become_user(identity)
    # After the change of identity, which makes the kernel forget it.
    _call("prctl", PR_SET_PDEATHSIG, int(orphan_signal))
    if os.getppid() != int(parent):
        sys.exit("the parent ended before the command began")
    # Python ignores this one, and a program inherits what is ignored.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
