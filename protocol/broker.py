"""The embedded broker (amqtt): nothing else need be installed to try a fleet.

It is for trials: it keeps everything in memory, asks nobody for a password, speaks MQTT 3.1.1 and
therefore listens on loopback unless told otherwise. A fleet that matters runs Mosquitto.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from contextlib import ExitStack

from protocol.errors import TransportError
from protocol.transport import BrokerAddress

log = logging.getLogger(__name__)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listens on now."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return so many different TCP ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class EmbeddedBroker:
    """Run amqtt in a thread of this process.

    >>> with EmbeddedBroker() as broker:
    ...     print(broker.address.host)
    127.0.0.1
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address = BrokerAddress(host, port or free_port(host), version="3.1.1")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="embedded-broker", daemon=True)

    def start(self) -> None:
        """Listen, and return once connections are taken.

        Raises:
            TransportError: the port is taken or may not be used.
        """
        self._thread.start()
        self._ready.wait(30)
        if self._failure is not None or not self._ready.is_set():
            # amqtt wraps the error of the socket, which says it shorter.
            why = (self._failure and self._failure.__context__) or self._failure or "no answer"
            raise TransportError(
                f"the embedded broker can't listen on {self.address.host}:{self.address.port} "
                f"({why}); name another port with --port, or a broker of your own with --broker"
            )

    def stop(self) -> None:
        """Stop listening and end the thread."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # the top of a thread: `start` reports it
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        from amqtt.broker import Broker

        for name in ("amqtt", "transitions"):
            # It logs with a traceback what it also raises, and `start` says in one line.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # A client that hangs up while amqtt answers it is no error of ours to print.
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(
            lambda _, context: log.debug("embedded broker: %s", context.get("message"))
        )
        broker = Broker(
            {
                "listeners": {
                    "default": {
                        "type": "tcp",
                        "bind": f"{self.address.host}:{self.address.port}",
                    }
                },
                "plugins": {
                    "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
                },
            }
        )
        self._stop = asyncio.Event()
        await broker.start()
        self._ready.set()
        await self._stop.wait()
        await broker.shutdown()
