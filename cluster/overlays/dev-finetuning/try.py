"""A verdict and a tiny finetuning job against a service on 127.0.0.1:8000, with the key in REFT_KEY."""

import json
import os
import time

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=os.environ["REFT_KEY"])
verdict = client.moderations.create(input="Is there an easy way to tidy up a broken chair?").results[0]
print("verdict:", "flagged" if verdict.flagged else "allowed")

row = {"messages": [{"role": "user", "content": "Is this review good or bad? A lovely day."}]}
row["messages"].append({"role": "assistant", "content": "good"})
rows = (json.dumps(row) + "\n").encode() * 20
file = client.files.create(file=("train.jsonl", rows), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model="builtin", training_file=file.id, suffix="ci")
deadline = time.monotonic() + 1800
while job.status not in ("succeeded", "failed", "cancelled"):
    assert time.monotonic() < deadline, f"the job is still {job.status}"
    time.sleep(5)
    job = client.fine_tuning.jobs.retrieve(job.id)
print("job:", job.status, job.error)
assert job.status == "succeeded"
