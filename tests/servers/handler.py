"""What the HTTP servers of the tests share: connections that stay open, answers that leave in one piece, no lines."""

import socket
from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    """Answers requests; a subclass has `do_GET` and such."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body leave together: no delayed acknowledgement of 40 ms

    def setup(self) -> None:
        """Sends each answer at once."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""
