"""Runs a program in a folder, without random numbers from this machine: ``_predictable.py folder program ...``.

A User-Mode Linux that gets none has only the virtual clock and its command line to make its own from, and makes the
same ones in every run. A file of its own, started with ``-I -S``: it imports nothing of the package.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

# linux/prctl.h, linux/seccomp.h, linux/bpf_common.h, linux/audit.h
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_SYSCALL, _ARCHITECTURE = 0, 4
_X86_64 = 0xC000003E
_GETRANDOM = 318

_FILTER = (
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_JUMP_IF_EQUAL, 0, 3, _X86_64),
    (_LOAD, 0, 0, _SYSCALL),
    (_JUMP_IF_EQUAL, 0, 1, _GETRANDOM),
    (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
    (_RETURN, 0, 0, _RET_ALLOW),
)


class _Program(ctypes.Structure):
    """``struct sock_fprog``"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _refuse_random_numbers() -> None:
    """From here on, and in whatever this process becomes, getrandom() does not exist."""
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(_FILTER), instructions)), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            reason = os.strerror(ctypes.get_errno())
            print(f"no two runs will be alike: a seccomp filter is not permitted here: {reason}", file=sys.stderr)
            return


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    if platform.machine() == "x86_64":
        _refuse_random_numbers()
    os.execv(sys.argv[2], sys.argv[2:])
