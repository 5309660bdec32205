"""A question over a bare zmq.REQ socket: one message out, one message back. Needs pyzmq and msgpack."""

import sys

import msgpack
import zmq

if len(sys.argv) != 3:
    sys.exit("usage: req.py ENDPOINT QUESTION")  # the system service's: ipc:///run/edgellm/edgellm.sock
socket = zmq.Context.instance().socket(zmq.REQ)
socket.setsockopt(zmq.LINGER, 0)
socket.connect(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
request = {"v": 1, "id": 1, "op": "chat", "messages": messages, "max_tokens": 64, "temperature": 0}
socket.send(msgpack.packb(request))
if not socket.poll(60_000):
    sys.exit(f"no answer from {sys.argv[1]}")
reply = msgpack.unpackb(socket.recv())
print(reply["text"] if reply["ev"] == "done" else f"{reply['code']}: {reply['message']}")
sys.exit(reply["ev"] != "done")
