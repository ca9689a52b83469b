"""guidellm, unchanged: four requests of synthetic text through its command line, for both APIs; none may fail.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] has the tokenizer's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from guidellm.cli import cli

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 32, 16


def check_load(request_format: str) -> None:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = {
            "backend": f"kind=openai_http,target={BASE_URL.removesuffix('/v1')},request_format={request_format}",
            "profile": "kind=synchronous",
            "constraint": f"kind=max_requests,count={NUM_REQUESTS}",
            "data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
            "tokenizer": f"kind=hf_auto,model={WANTED['folder']}",
            "output": f"kind=json,path={report}",
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        cli(["run", *arguments, "--disable-console"], standalone_mode=False)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]["info"]["error"]
    lengths = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    # On a busy machine guidellm may end before the last answers have come from its own processes.
    assert 0 < len(lengths) <= NUM_REQUESTS
    assert set(lengths) == {OUTPUT_TOKENS}


if __name__ == "__main__":
    check_load("/v1/chat/completions")
    check_load("/v1/completions")
