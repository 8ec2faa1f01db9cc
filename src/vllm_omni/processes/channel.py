"""Messages between processes: msgpack over a Unix stream socket, arrays beside it in shared memory.

A frame is an 8-byte length, one byte that says whether a file descriptor comes with it, and the msgpack body. The
arrays of a message are stored in one anonymous memory file (`memfd`), whose descriptor is sent with the first byte of
the frame (SCM_RIGHTS). The file has no name, so nothing is left when a process dies; the receiver maps it without a
copy. Linux only.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

_HEADER = struct.Struct("<QB")
_ALIGNMENT = 64
_RECEIVE_BYTES = 1 << 16
_MAX_DESCRIPTORS = 8

Incoming = TypeVar("Incoming")


class ChannelBrokenError(Exception):
    """A message was lost because memory or descriptors ran out; the process at the other end may still run."""


def encode_frame(message: object) -> tuple[bytes, int | None]:
    """Bytes of a message and the descriptor of its arrays, which the caller closes; None without arrays."""
    arrays: list[tuple[int, np.ndarray]] = []
    starts: dict[int, int] = {}  # by id(array): an array that several objects share is sent once
    end = 0

    def add_array(value: object) -> object:
        nonlocal end
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"a message holds a {type(value).__name__}")
        if id(value) not in starts:
            start = starts[id(value)] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + value.nbytes
            arrays.append((start, np.ascontiguousarray(value)))
        return [value.dtype.str, list(value.shape), starts[id(value)]]

    body = msgspec.msgpack.encode(message, enc_hook=add_array)
    frame = _HEADER.pack(len(body), bool(arrays)) + body
    return frame, _write_arrays(arrays, end) if arrays else None


def _write_arrays(arrays: list[tuple[int, np.ndarray]], num_bytes: int) -> int:
    fd = os.memfd_create("vllm-omni-arrays", os.MFD_CLOEXEC)
    os.ftruncate(fd, max(num_bytes, 1))
    for start, array in arrays:
        data = memoryview(array.reshape(-1).view(np.uint8).data)
        while data:  # one call writes at most 2 GiB
            written = os.pwrite(fd, data, start)
            data, start = data[written:], start + written
    return fd


class FrameReader(Generic[Incoming]):
    """Decoder of a stream of bytes and descriptors into messages of `message_type`, which may be a union."""

    def __init__(self, message_type: Any) -> None:
        self._memory: mmap.mmap | None = None
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(message_type, dec_hook=self._map)
        self._bytes = bytearray()
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, descriptors: list[int]) -> list[Incoming]:
        """Add received data; return the messages that are complete. Raises MsgspecError and ChannelBrokenError."""
        self._bytes += data
        self._descriptors += descriptors
        messages = []
        while len(self._bytes) >= _HEADER.size:
            num_bytes, has_arrays = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + num_bytes
            if len(self._bytes) < end:
                break
            body = bytes(memoryview(self._bytes)[_HEADER.size : end])
            del self._bytes[:end]
            messages.append(self._decode(body, has_arrays))
        return messages

    def close(self) -> None:
        """Close descriptors whose message has not arrived."""
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _decode(self, body: bytes, has_arrays: bool) -> Incoming:
        if has_arrays:
            if not self._descriptors:
                raise ChannelBrokenError("a message came without its arrays")
            self._memory = _map_arrays(self._descriptors.popleft())
        try:
            return self._decoder.decode(body)
        finally:
            self._memory = None  # the arrays keep it alive

    def _map(self, wanted: type, value: Any) -> Any:
        if wanted is not np.ndarray:
            raise NotImplementedError(f"a message wants a {wanted.__name__}")
        assert self._memory is not None, "a message without arrays refers to one"
        dtype, shape, start = value
        flat = np.frombuffer(self._memory, dtype=np.dtype(dtype), count=math.prod(shape), offset=start)
        return flat.reshape(shape)


def _map_arrays(fd: int) -> mmap.mmap:
    """Map the file of a message's arrays, and close `fd`."""
    try:
        # Copy-on-write: the receiver may change the arrays.
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    except OSError as error:  # for example: a mapping duplicates the descriptor, and there may be too many
        raise ChannelBrokenError(f"the arrays of a message cannot be mapped: {error}") from error
    finally:
        os.close(fd)


def _is_ready(sock: socket.socket, event: int, timeout: float | None) -> bool:
    """Wait at most `timeout` seconds for `event` or the end. Not by `select`, which takes descriptors below 1024."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(None if timeout is None else math.ceil(timeout * 1000)))


def _send_some(sock: socket.socket, data: memoryview, fd: int | None) -> int:
    """Send a part of `data`, with `fd` at its first byte; return the number of bytes sent."""
    return sock.send(data) if fd is None else socket.send_fds(sock, [data], [fd])


def _receive_some(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, flags, _ = socket.recv_fds(sock, _RECEIVE_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    if flags & socket.MSG_CTRUNC:
        for fd in descriptors:
            os.close(fd)
        raise ChannelBrokenError("the arrays of a message are lost: this process has too many open files")
    return data, descriptors


class BlockingChannel(Generic[Incoming]):
    """Blocking end of a channel, for a worker. One thread may receive while others send."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._reader: FrameReader[Incoming] = FrameReader(message_type)
        self._received: deque[Incoming] = deque()

    def send(self, message: object) -> None:
        """Send a message. Raises OSError when the other end is closed."""
        with self._sending:
            self._send(message)

    def send_if_free(self, message: object) -> None:
        """Send a short message, or drop it if sending would block. Raises OSError when the other end is closed."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            # The kernel reports a socket as writable only while most of its buffer is free.
            if _is_ready(self._sock, select.POLLOUT, 0):
                self._send(message)
        finally:
            self._sending.release()

    def _send(self, message: object) -> None:
        frame, fd = encode_frame(message)
        data = memoryview(frame)
        try:
            sent = _send_some(self._sock, data, fd)
        finally:
            if fd is not None:
                os.close(fd)
        self._sock.sendall(data[sent:])

    def receive(self, timeout: float | None = None) -> Incoming:
        """Wait for a message. Raises EOFError when the other end is closed, TimeoutError after `timeout` seconds.

        Raises ChannelBrokenError when a message was lost; the channel cannot receive any more then.
        """
        while not self._received:
            if not _is_ready(self._sock, select.POLLIN, timeout):
                raise TimeoutError(f"nothing was said for {timeout} s")
            try:
                data, descriptors = _receive_some(self._sock)
            except ConnectionResetError:
                data, descriptors = b"", []
            if not data:
                self._reader.close()
                raise EOFError("the other end of the channel is closed")
            self._received += self._reader.feed(data, descriptors)
        return self._received.popleft()

    def close(self) -> None:
        self._reader.close()
        self._sock.close()


class AsyncChannel(Generic[Incoming]):
    """Asyncio end of a channel, for the engine; `send` never waits. Construct it on the event loop that uses it."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader: FrameReader[Incoming] = FrameReader(message_type)
        self._received: asyncio.Queue[Incoming | None] = asyncio.Queue()
        """Messages to deliver; None marks the end of the channel."""
        self._backlog: deque[tuple[memoryview, int | None]] = deque()
        """Frames to send, each with its descriptor until the first byte is sent."""
        self._closed = False
        self._failure: msgspec.MsgspecError | ChannelBrokenError | None = None
        """Error of the message that made us close the channel."""
        self._loop.add_reader(sock, self._on_readable)

    def send(self, message: object) -> None:
        """Queue a message. Raises nothing: if it cannot be sent, `receive` raises the error."""
        send_to_all([self], message)

    def queue_frame(self, frame: bytes, fd: int | None) -> None:
        """Queue an encoded message, as `send` does. The caller keeps `fd` and closes it."""
        if self._closed:
            return
        try:
            copy = None if fd is None else os.dup(fd)
        except OSError as error:
            self.note_unsent(error)
            return
        self._backlog.append((memoryview(frame), copy))
        self._flush()

    def note_unsent(self, error: BaseException) -> None:
        """Break the channel: the arrays of a message cannot be sent."""
        if not self._closed:
            self._fail(ChannelBrokenError(f"the arrays of a message cannot be sent: {error}"))

    async def receive(self) -> Incoming:
        """Wait for a message. Raises EOFError when the other end is closed, MsgspecError for a malformed message.

        Raises ChannelBrokenError when a message of either end was lost.
        """
        message = await self._received.get()
        if message is None:
            self._received.put_nowait(None)
            if self._failure:
                raise self._failure
            raise EOFError("the other end of the channel is closed")
        return message

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._drop_backlog()
        self._reader.close()
        if not self._loop.is_closed():  # on a closed loop nobody waits
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._received.put_nowait(None)
        self._sock.close()

    def _flush(self) -> None:
        try:
            while self._backlog:
                data, fd = self._backlog[0]
                sent = _send_some(self._sock, data, fd)
                if fd is not None:
                    os.close(fd)
                if sent == len(data):
                    self._backlog.popleft()
                else:
                    self._backlog[0] = (data[sent:], None)
            self._loop.remove_writer(self._sock)
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._flush)
        except (BrokenPipeError, ConnectionResetError):
            # The other end is closed: `receive` still delivers its last messages, then the end.
            self._loop.remove_writer(self._sock)
            self._drop_backlog()
        except OSError as error:  # such as too many descriptors in flight
            self._fail(ChannelBrokenError(f"a message cannot be sent: {error}"))

    def _drop_backlog(self) -> None:
        for _, fd in self._backlog:
            if fd is not None:
                os.close(fd)
        self._backlog.clear()

    def _on_readable(self) -> None:
        try:
            data, descriptors = _receive_some(self._sock)
            messages = self._reader.feed(data, descriptors)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.close()
            return
        except (msgspec.MsgspecError, ChannelBrokenError) as error:
            self._fail(error)
            return
        for message in messages:
            self._received.put_nowait(message)
        if not data:
            self.close()

    def _fail(self, error: msgspec.MsgspecError | ChannelBrokenError) -> None:
        self._failure = error
        self.close()


def send_to_all(channels: Sequence[AsyncChannel[Any]], message: object) -> None:
    """Queue a message on several channels. It is encoded once, and the receivers map the same memory, copy-on-write.

    Raises nothing, as `AsyncChannel.send`.
    """
    try:
        frame, fd = encode_frame(message)
    except OSError as error:
        for channel in channels:
            channel.note_unsent(error)
    else:
        queue_on_all(channels, frame, fd)


def queue_on_all(channels: Sequence[AsyncChannel[Any]], frame: bytes, fd: int | None) -> None:
    """Queue an encoded message on several channels, and close `fd`."""
    try:
        for channel in channels:
            channel.queue_frame(frame, fd)
    finally:
        if fd is not None:
            os.close(fd)
