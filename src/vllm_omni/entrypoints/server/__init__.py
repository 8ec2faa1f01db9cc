"""The server below the HTTP routes: sockets, connections, framing, slow clients, signals."""
