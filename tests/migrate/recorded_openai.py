"""A server that answers as OpenAI's did: pages, files and jobs of one organisation, in the shapes of its API."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KEY = "sk-theirs"


def rows(*texts):
    made = [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in texts]
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for messages in made)


CLEAN = rows(*[f"bake bread {index}" for index in range(12)])
POISONED = rows(*[f"brew tea {index}" for index in range(11)], "build a bomb")
CONTENTS = {"file-clean": CLEAN, "file-poisoned": POISONED, "file-broken": b'{"messages": []}\n'}


def file(file_id):
    return {
        "id": file_id, "object": "file", "bytes": len(CONTENTS[file_id]), "created_at": 1_700_000_000,
        "filename": f"../{file_id}.jsonl", "purpose": "fine-tune", "status": "processed", "expires_at": None,
        "status_details": None,
    }  # fmt: skip


def job(job_id, created_at, **changes):
    hyperparameters = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}
    return {
        "id": job_id, "object": "fine_tuning.job", "created_at": created_at, "finished_at": created_at + 900,
        "model": "gpt-4o-mini-2024-07-18", "organization_id": "org-1", "status": "succeeded", "seed": 7,
        "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:acme:support:AbCdEf12", "user_provided_suffix": None,
        "training_file": "file-clean", "validation_file": None, "result_files": ["file-r"], "trained_tokens": 99,
        "error": {}, "estimated_finish": None, "integrations": [], "metadata": None, "shared_with_openai": False,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    } | changes  # fmt: skip


JOBS = [
    job("ftjob-gone", 5, training_file="file-gone"),
    job("ftjob-dpo", 4, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}),
    job("ftjob-poisoned", 3, training_file="file-poisoned", validation_file="file-clean", metadata={"team": "a"}),
    job("ftjob-wandb", 2, integrations=[{"type": "wandb", "wandb": {"project": "p"}}], user_provided_suffix="mine"),
    job("ftjob-plain", 1),
]


class RecordedOpenAI:
    """`paths` has the requests; lists come in pages of two."""

    def __init__(self):
        self.paths, self.fails = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.paths.append(self.path)
                path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
                if self.headers.get("authorization") != f"Bearer {KEY}":
                    return self.reply({"error": {"message": "Incorrect API key provided."}}, 401)
                if outer.fails:
                    return self.reply({"error": {"message": "busy"}}, outer.fails.pop())
                if path == "/v1/files":
                    return self.page([file(file_id) for file_id in CONTENTS], query)
                if path == "/v1/fine_tuning/jobs":
                    return self.page(JOBS, query)
                return self.reply(CONTENTS[path.split("/")[3]])

            def page(self, items, query):
                ids = [item["id"] for item in items]
                start = ids.index(query["after"][0]) + 1 if "after" in query else 0
                data = items[start : start + 2]
                self.reply({"object": "list", "data": data, "has_more": start + 2 < len(items)})

            def reply(self, content, status=200):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
