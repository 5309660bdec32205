"""The I/O thread: sole owner of the ROUTER and PUB sockets, and of all that clients send and are sent.

address.py      the socket file: lock, mode, group
tcp_address.py  a tcp endpoint in its place
listener.py     what both sockets do with their address
zap.py          whose keys are let in over tcp
router.py       the ROUTER: receive, send without waiting, who has vanished
publisher.py    the PUB socket: state changes and statistics
access.py       who a peer is, its priority ceiling and quota
gate.py         whom the governor turns away, and who may limit what runs
admission.py    a wire request → tokens, limits, defaults
stream.py       one open request: text, stop strings, deltas, the final message
connection.py   one client: its open requests, what waits to be sent
statistics.py   how things are
served.py       what is served, as seen from here
exchange.py     all connections and open requests: hear, take, send, bury
server.py       the thread and its loop
"""

from edgellm.server.served import EngineHandle, EngineStats, GovernorHandle, ServedModel
from edgellm.server.server import Server

__all__ = ["EngineHandle", "EngineStats", "GovernorHandle", "ServedModel", "Server"]
