"""Options of vLLM, SGLang and Baton's nodes that users try on `baton serve`, and what the error adds to each."""

from __future__ import annotations

_SAME = {
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--tp-size": "--tp",
    "--pipeline-parallel-size": "--prefill-pp",
    "-pp": "--prefill-pp",
    "--pp-size": "--prefill-pp",
    "--data-parallel-size": "--prefill and --decode, numbers of workers",
    "-dp": "--prefill and --decode, numbers of workers",
    "--dp-size": "--prefill and --decode, numbers of workers",
    "--model-path": "--model",
    "--context-length": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--kv-cache-dtype": "--kv-dtype",
    "--tool-call-parser": "--tool-format, and mostly found from the chat template",
    "--reasoning-parser": "--reasoning-format, and mostly found from the chat template",
    "--speculative-config": "--worker-arg=--speculate=ngram",
    "--speculative-algorithm": "--worker-arg=--speculate=ngram",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--allowed-origins": "--cors-origin",
    "--uvicorn-log-level": "--proxy-arg=--log-level=LEVEL",
}
_NEEDLESS = {
    "--enable-auto-tool-choice": "models whose chat template has tools call them",
    "--enable-prefix-caching": "it is always on",
    "--enable-chunked-prefill": "it is always on",
    "--enable-lora": "--lora-modules or --adapter-root is enough",
    "--disable-log-requests": "requests are not logged",
}
_OF_ONE_ROLE = {
    **dict.fromkeys(("--num-blocks", "--block-tokens", "--kv-memory-gib", "--speculate", "--load-format"), "worker"),
    **dict.fromkeys(("--deterministic", "--plane", "--threads", "--max-loras", "--max-waiting"), "worker"),
    **dict.fromkeys(("--policy", "--slo-ttft-ms", "--slo-tpot-ms", "--max-queue", "--otlp-endpoint"), "proxy"),
}

OPTIONS_OF_OTHERS = {
    **{name: f"here it is {same}" for name, same in _SAME.items()},
    **{name: f"not needed: {reason}" for name, reason in _NEEDLESS.items()},
    **{name: f"goes behind --{role}-arg=" for name, role in _OF_ONE_ROLE.items()},
}
