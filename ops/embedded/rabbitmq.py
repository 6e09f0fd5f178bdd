"""RabbitMQ: the distribution's server, for a stack that asks for it as its message broker.

Two processes, because the server looks for a port mapper and would leave one behind, detached, if
it found none: `epmd`, and the server, which is told to start none.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import amqp

from ops.embedded.credentials import write_private
from ops.embedded.ports import HOST, Ports
from ops.embedded.process import Process, StackError

NAME = "tidegate"
"""Of the user, and of the virtual host."""
NODE = f"{NAME}@localhost"
BIN = Path("/usr/lib/rabbitmq/bin")
"""The server's own scripts. Those on the PATH change to the user `rabbitmq` first."""

_LOOPBACK = "-kernel inet_dist_use_interface {127,0,0,1}"
_NO_BUSY_WAIT = "+sbwt none +sbwtdcpu none +sbwtdio none"
"""Threads that have nothing to do sleep at once: others share this machine."""


def installed() -> bool:
    return (BIN / "rabbitmq-server").exists() and shutil.which("epmd") is not None


def url(port: int, password: str) -> str:
    return f"amqp://{NAME}:{password}@{HOST}:{port}/{NAME}"


def processes(
    folder: Path, ports: Ports, password: str, cookie: str, env: Mapping[str, str]
) -> list[Process]:
    """The server on `folder`, and its port mapper. Raises StackError where it is not installed."""
    if not installed():
        raise StackError(
            "RabbitMQ is not installed: `apt-get install rabbitmq-server`,"
            " or do without TIDEGATE_BROKER=rabbitmq"
        )
    environment = {**env, **_environment(folder, ports)}

    def prepare() -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_private(folder / "rabbitmq.conf", configuration(ports.rabbitmq, password))
        write_private(folder / "enabled_plugins", "[].\n")
        write_private(folder / "inetrc", "{lookup, [file]}.\n")
        # Whoever knows it may tell the server anything, `rabbitmqctl` among others.
        write_private(folder / ".erlang.cookie", cookie)

    def ready() -> None:
        connection = amqp.Connection(
            f"{HOST}:{ports.rabbitmq}",
            userid=NAME,
            password=password,
            login_method="PLAIN",
            virtual_host=NAME,
            connect_timeout=2,
        )
        connection.connect()
        connection.transport.sock.settimeout(2)
        connection.close()

    mapper = Process(
        "epmd",
        ["epmd", "-port", str(ports.epmd), "-address", HOST],
        env,
        ready=_assumed,
        settle=0.1,
        # Last to stop: the server signs off.
        tier=-1,
    )
    server = Process(
        "rabbitmq",
        # Without input it would be a shell that waits for signals, beside the server.
        [BIN / "rabbitmq-server", "-noinput"],
        environment,
        prepare=prepare,
        ready=ready,
        after=("epmd",),
        stop_timeout=20.0,
    )
    return [mapper, server]


def configuration(port: int, password: str) -> str:
    settings = {
        "listeners.tcp.1": f"{HOST}:{port}",
        # Made at the first start; there is no guest then.
        "default_vhost": NAME,
        "default_user": NAME,
        "default_pass": password,
        # Past these it takes no more messages, until there is room again.
        "vm_memory_high_watermark.absolute": "512MB",
        "disk_free_limit.absolute": "64MB",
    }
    return "".join(f"{name} = {value}\n" for name, value in settings.items())


def _environment(folder: Path, ports: Ports) -> dict[str, str]:
    """Every file of its own in `folder`, none of the distribution's."""
    return {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": NODE,
        "RABBITMQ_DIST_PORT": str(ports.rabbitmq_dist),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_LOGS": "-",
        # The server itself, in place of the script that starts it.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{_LOOPBACK} {_NO_BUSY_WAIT}",
        "ERL_EPMD_PORT": str(ports.epmd),
        "ERL_EPMD_ADDRESS": HOST,
        "ERL_ZFLAGS": "-start_epmd false",
        # Without helpers for the system's resolver, which outlive a killed server by a second.
        "ERL_INETRC": str(folder / "inetrc"),
        # Tables sized for a million open files, where that is the limit, take gigabytes.
        "ERL_MAX_PORTS": "65536",
        "ERL_CRASH_DUMP_SECONDS": "0",
    }


def _assumed() -> None:
    """Nothing to ask: the server starts only where it answers."""
