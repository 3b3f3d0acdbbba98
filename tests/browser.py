"""Pages in a headless Chromium: what a script finds in them."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 200

# Runs a script, the body of an async function, and sends back what it returns or throws.
_HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const open = (url, width) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => done(frame.contentWindow);
  frame.src = url;
  document.body.append(frame);
});
const script = async () => { SCRIPT };
script().then((value) => ({value}), (error) => ({error: String(error.stack || error)})).then(
  (result) => fetch("/result", {method: "POST", body: JSON.stringify(result)}));
</script>"""


def found(site: Path, script: str) -> Any:
    """What ``script`` returns, the body of an async function: ``await open(url, width)`` is the window of a page."""
    assert CHROMIUM, "no Chromium"
    results: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(site))

        def do_GET(self) -> None:
            if self.path != "/harness":
                return super().do_GET()
            self._answer(_HARNESS.replace("SCRIPT", script).encode())

        def do_POST(self) -> None:
            results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(b"")

        def _answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"]
        command = [CHROMIUM, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/harness"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            result = results.get(timeout=SECONDS)
        finally:
            browser.terminate()
            browser.wait(20)
            server.shutdown()
            server.server_close()
    assert "error" not in result, result["error"]
    return result["value"]
