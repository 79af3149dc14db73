"""A second implementation of OpenAI's API, with nothing of ours in it: the standard library and a dictionary."""

import json
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-upstream"


class SmallUpstream:
    """Files, jobs, models and chat; `seen` has every request, `answer` is what the model says."""

    def __init__(self):
        self.files, self.seen, self.answer, self.fails = {}, [], "fine", None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.partition("?")[0]
                outer.seen.append((self.command, self.path, dict(self.headers), body))
                if self.headers.get("authorization") != f"Bearer {KEY}":
                    return self.reply({"error": {"message": "bad key"}}, 401)
                if path == "/v1/models":
                    return self.reply({"object": "list", "data": [{"id": "m", "object": "model"}]})
                if outer.fails:
                    return self.reply({"error": {"message": "no"}}, outer.fails, {"retry-after": "7"})
                if path == "/v1/files" and self.command == "POST":
                    head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
                    parts = BytesParser().parsebytes(head + body).get_payload()
                    content = next(p.get_payload(decode=True) for p in parts if p.get_filename())
                    outer.files[name := f"file-{len(outer.files)}"] = content
                    return self.reply({"id": name, "object": "file", "bytes": len(content), "purpose": "fine-tune"})
                if path.startswith("/v1/files/"):
                    name = path.split("/")[3]
                    if name not in outer.files:
                        return self.reply({"error": {"message": "none"}}, 404)
                    if self.command == "DELETE":
                        del outer.files[name]
                    return self.reply({"id": name, "object": "file", "deleted": True})
                if path == "/v1/fine_tuning/jobs":
                    return self.reply({"id": "ftjob-1", "object": "fine_tuning.job", **json.loads(body)})
                if path == "/v1/chat/completions":
                    return self.chat(json.loads(body))
                return self.reply({"error": {"message": f"unknown {path}"}}, 404)

            do_GET = do_POST = do_DELETE = handle_any

            def chat(self, asked):
                if not asked.get("stream"):
                    message = {"role": "assistant", "content": outer.answer}
                    return self.reply({"id": "c", "object": "chat.completion", "choices": [
                        {"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip
                half = len(outer.answer) // 2
                texts = (outer.answer[:half], outer.answer[half:])
                chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
                content = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
                return self.reply(content + b"data: [DONE]\n\n", kind="text/event-stream")

            def reply(self, content, status=200, headers=(), kind="application/json"):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                headers = {"content-type": kind, "content-length": str(len(content)), **dict(headers)}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def calls(self, method, path):
        """The bodies of the requests with this method and path."""
        return [body for seen, at, _, body in self.seen if (seen, at) == (method, path)]

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
