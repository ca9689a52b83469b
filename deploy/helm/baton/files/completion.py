"""What `helm test` runs: one completion through the API, with the answer that is known for the demo model.

python completion.py URL MODEL      # KEY in the environment, where the API needs one
"""

import json
import os
import sys
import urllib.request

PROMPT = "Once upon a time there was a little fox who lived in the forest with his mother. One day"
DEMO_ANSWER = ", the fox"


def ask(path, body=None):
    headers = {"content-type": "application/json"}
    if os.environ.get("KEY"):
        headers["authorization"] = "Bearer " + os.environ["KEY"]
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(sys.argv[1] + path, data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


name = ask("/v1/models")["data"][0]["id"]
answer = ask("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
text, usage = answer["choices"][0]["text"], answer["usage"]
print(f"{name}: {text!r}, {usage['prompt_tokens']} + {usage['completion_tokens']} tokens")
wrong = not usage["completion_tokens"] or (sys.argv[2] == "demo" and not text.startswith(DEMO_ANSWER))
sys.exit("the answer is not the one that is known" if wrong else 0)
