"""The requests that arrive in one turn of the event loop go to the application together. Data plane, front end.

Reading from sockets and running Python by turns would drive each out of the core's caches for the other; and what is
done once for many requests need not be done for each.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mms.http.connection import Connection
    from mms.http.exchange import Application, Exchange


class Arrivals:
    """What all connections of a server have received since the application was last handed something."""

    def __init__(self, application: Application) -> None:
        self.exchanges: list[Exchange] = []  # who adds the first one has `hand_over` called at the end of the turn
        self._application = application

    def forget(self, connection: Connection) -> None:
        """Its client has left."""
        self.exchanges[:] = [exchange for exchange in self.exchanges if exchange.connection is not connection]

    def hand_over(self) -> None:
        """Called by the event loop between reading and reading again."""
        exchanges = self.exchanges[:]
        self.exchanges.clear()
        self._hand(exchanges)

    def _hand(self, exchanges: list[Exchange]) -> None:
        try:
            self._application.handle(exchanges)
        except Exception as error:  # a fault of ours: only who has met it goes without an answer
            if len(exchanges) == 1:
                fault = {"message": "a request could not be handled", "exception": error}
                asyncio.get_running_loop().call_exception_handler(fault)
                exchanges[0].connection.abort()
                return
            for exchange in exchanges:
                if exchange.work is None and exchange.connection.owes(exchange):
                    self._hand([exchange])
