"""A question over a bare zmq.REQ socket: one message out, one message back. Needs pyzmq and msgpack."""

import sys

import msgpack
import zmq

socket = zmq.Context.instance().socket(zmq.REQ)
socket.connect(sys.argv[1])  # ipc:///run/edgellm/edgellm.sock
messages = [{"role": "user", "content": sys.argv[2]}]
request = {"v": 1, "id": 1, "op": "chat", "messages": messages, "max_tokens": 64, "temperature": 0}
socket.send(msgpack.packb(request))
reply = msgpack.unpackb(socket.recv())
print(reply["text"] if reply["ev"] == "done" else f"{reply['code']}: {reply['message']}")
sys.exit(reply["ev"] != "done")
