"""Ask a server that serves a packed model (see serve_vllm.md): complete, stream, log-probabilities.

    vllm serve out/moe-tiny-2bit &
    python examples/vllm_client.py                # in an environment with openai, as that of vLLM is

The server speaks OpenAI's HTTP interface, so every client of it works, and knows nothing of quantization.
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description="Ask a server of a packed model.")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--prompt", default="In the beginning there was")
parser.add_argument("--tokens", type=int, default=24)
args = parser.parse_args()

client = OpenAI(base_url=args.url, api_key="none")
model = client.models.list().data[0].id
options = {"model": model, "prompt": args.prompt, "max_tokens": args.tokens, "temperature": 0}

# Complete
choice = client.completions.create(**options).choices[0]
print(f"{model} goes on: {choice.text!r} ({choice.finish_reason})")

# Stream: the same text, as it is generated
print("streamed: ", end="")
for event in client.completions.create(**options, stream=True):
    print(event.choices[0].text, end="", flush=True)
print()

# Log-probabilities of what was generated, and of the likeliest other tokens
logprobs = client.completions.create(**{**options, "max_tokens": 5}, logprobs=3).choices[0].logprobs
for token, chosen, others in zip(
    logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
):
    likeliest = ", ".join(f"{other!r} {value:.3f}" for other, value in others.items())
    print(f"{token!r}: {chosen:.3f}   ({likeliest})")
