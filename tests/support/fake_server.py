"""A stand-in for a vLLM server, played by a thread."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mgrpo.rollout.worker import WeightReceiver


class FakeServer(WeightReceiver):
    """Speaks vLLM's protocol with a real worker extension; a prompt is answered by its own length in tokens."""

    def __init__(self):
        self.calls, self.weights, self.hangs, self.logprob, self.max_model_len = [], {}, False, -0.5, 40
        self.writes = []
        self.lost = 0  # log-probs that are missing
        self.answers = {"/reset_prefix_cache": {"success": True}}
        self.status = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
                path = self.path.partition("?")[0]
                status, reply = fake.status.get(path, 200), None
                try:
                    reply = fake.answer(path, body)
                except Exception as error:
                    status, reply = 500, str(error)
                data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request, client_address):
                """Nothing: a client that hung up is what some tests are about."""

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def reload_weights(self, weights_iterator):
        self.weights = dict(weights_iterator)

    def answer(self, path, body):
        self.calls.append(path if path != "/collective_rpc" else body["method"])
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": self.max_model_len}]}
        if path == "/collective_rpc":
            return {"results": [getattr(self, body["method"])(*body.get("args", []))]}
        if path == "/metrics":
            return 'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:other 1\n'
        if path == "/v1/completions":
            while self.hangs:
                time.sleep(0.05)
            self.last = body
            tokens = self.writes or [7] * len(body["prompt"])
            one = {"token_ids": tokens, "logprobs": {"token_logprobs": [self.logprob] * (len(tokens) - self.lost)}}
            return {"choices": [one | {"finish_reason": "stop"}] * body["n"]}
        return self.answers.get(path, {})

    def close(self):
        self.hangs = False
        self.http.shutdown()
        self.http.server_close()
