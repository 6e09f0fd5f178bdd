"""The whole platform on one machine: no Docker, no root, no GPU, everything real.

`Stack` starts PostgreSQL, Redis, Triton and the product's own processes, keeps them running and
takes them down; `python -m ops.embedded up` is a `Stack` with a terminal around it.
"""

from ops.embedded.ports import Ports
from ops.embedded.process import Process, StackError
from ops.embedded.stack import Stack

__all__ = ["Ports", "Process", "Stack", "StackError"]
