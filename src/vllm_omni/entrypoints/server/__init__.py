"""Server plumbing below HTTP routes: sockets, connections, framing, slow clients, signals."""
