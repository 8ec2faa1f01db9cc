"""Start the real server on the demo model, ask it for a picture with the OpenAI SDK, and stop it.

`make demo` runs this once; `make serve` adds `--stay`: the server stays up until Ctrl-C.
"""

from __future__ import annotations

import argparse
import base64
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue

import openai

PROMPT = "a panda on a pink background"
START_SECONDS = 180.0
STOP_SECONDS = 60.0

HOW_TO = """
The server is up at {url}

  curl {url}/v1/images/generations -H 'content-type: application/json' \\
    -d '{{"model": "demo", "prompt": "{prompt}"}}' \\
    | grep -o '"b64_json":"[^"]*' | cut -d'"' -f4 | base64 -d > picture.png

  import base64, openai
  client = openai.OpenAI(base_url="{url}/v1", api_key="none")
  picture = client.images.generate(model="demo", prompt="{prompt}")
  open("picture.png", "wb").write(base64.b64decode(picture.data[0].b64_json))

The model has three LoRA adapters: night, lighthouse and fast. A request may name several, each with a scale:

  curl {url}/v1/images/generations -H 'content-type: application/json' \\
    -d '{{"prompt": "a lighthouse", "lora": [{{"name": "night", "scale": 0.5}}, {{"name": "lighthouse"}}]}}' \\
    | grep -o '"b64_json":"[^"]*' | cut -d'"' -f4 | base64 -d > lighthouse.png

Ctrl-C stops it.
"""


class Server:
    """`vllm serve demo --omni` as a child process; its output is passed through."""

    def __init__(self, port: int) -> None:
        arguments = ["serve", "demo", "--omni", "--host", "127.0.0.1", "--port", str(port)]
        print("$ vllm", *arguments, flush=True)
        # Without log lines for the polling of readiness.
        arguments += ["--disable-access-log-for-endpoints", "/ready"]
        # Its own session: Ctrl-C reaches only this process, which then stops the server.
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._addresses: SimpleQueue[str] = SimpleQueue()
        self._echo = threading.Thread(target=self._pass_output_on, daemon=True)
        self._echo.start()

    def _pass_output_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print("  |", line, end="", flush=True)
            if found := re.search(r"Listening on (\S+)", line):
                self._addresses.put(found[1])

    def wait_until_ready(self) -> str:
        """Wait until the server is ready; return its address."""
        deadline = time.monotonic() + START_SECONDS
        url = None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {self._process.returncode}")
            try:
                url = url or self._addresses.get(timeout=0.2)
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    return url
            except (Empty, urllib.error.URLError):
                time.sleep(0.2)
        raise SystemExit(f"the server was not ready within {START_SECONDS:g} s")

    def wait(self) -> None:
        self._process.wait()

    def stop(self) -> int:
        """Ask the server to end; return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise SystemExit(f"the server did not stop within {STOP_SECONDS:g} s") from None
        finally:
            self._echo.join(timeout=5)


def draw(url: str, prompt: str, path: Path) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    began = time.monotonic()
    answer = client.images.generate(model="demo", prompt=prompt)
    seconds = time.monotonic() - began
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    print(f"\n{prompt!r}: {path}, {answer.size}, {seconds:.2f} s\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--stay", action="store_true", help="leave the server up until Ctrl-C")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # both signals stop the server, too
        signal.signal(number, signal.default_int_handler)
    server = Server(args.port)
    try:
        url = server.wait_until_ready()
        draw(url, args.prompt, args.out)
        if args.stay:
            print(HOW_TO.format(url=url, prompt=args.prompt), flush=True)
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        code = server.stop()
    if code:
        raise SystemExit(f"the server ended with exit code {code}")
    print("The server has stopped in good order.")


if __name__ == "__main__":
    main()
