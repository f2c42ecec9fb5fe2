"""Client libraries against a running server: openai, litellm, langchain-openai, and the calls of `vllm bench serve`.

Those that are not installed are left out. Of vLLM its file of request functions is enough, which needs no CUDA:
--vllm=FILE is vllm/benchmarks/lib/endpoint_request_func.py of an unpacked wheel; it imports aiohttp, regex and tqdm.

  pip install openai litellm langchain-openai
  arrol-serve --config=gsm8k_qwen05b --config.model.path=DIR/model.gguf --config.model.dtype=float32 --port=8000
  python -m experiments.serve_clients --url=http://127.0.0.1:8000/v1 [--prompt="What is 2+3?"] [--out=FILE]

Completions, completions streamed, a list of prompts, log-probs; where the model has a chat template also chat, chat streamed and
a vote. Each whole text is compared with its stream. One JSON line a case; status 1 where a case failed. Needs no JAX.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
import sys

SETTINGS = {"max_tokens": 24, "temperature": 0, "seed": 0}


def with_openai(url: str, key: str, model: str, prompt: str) -> dict:
  import openai
  with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
    plain = client.completions.create(model=model, prompt=prompt, **SETTINGS)
    yield "completion", plain.choices[0].text
    parts = list(client.completions.create(model=model, prompt=prompt, stream=True, stream_options={"include_usage": True},
                                           **SETTINGS))
    yield "completion, streamed", "".join(p.choices[0].text for p in parts if p.choices)
    assert parts[-1].usage == plain.usage
    several = client.completions.create(model=model, prompt=[prompt, prompt], logprobs=2, **SETTINGS)
    assert [c.text for c in several.choices] == [plain.choices[0].text] * 2
    yield "two prompts with log-probs", several.choices[1].text
    try:
      client.completions.create(model=model, prompt=prompt, max_tokens=-1)
    except openai.BadRequestError as e:
      yield "a mistake", e.body["message"]
    if not chats(client.chat.completions.create, openai.BadRequestError, model, prompt):
      return
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": prompt}]
    chat = client.chat.completions.create(model=model, messages=messages, logprobs=True, top_logprobs=2, **SETTINGS)
    yield "chat", chat.choices[0].message.content
    stream = client.chat.completions.create(model=model, messages=messages, stream=True, **SETTINGS)
    yield "chat, streamed", "".join(p.choices[0].delta.content or "" for p in stream)
    voted = client.chat.completions.create(model=model, messages=messages, n=4, seed=0, max_tokens=24,
                                           extra_body={"vote": "majority"})
    yield "a vote", json.dumps({"answer": voted.vote["answer"], "share": voted.vote["share"]})


def chats(create, refused, model: str, prompt: str) -> bool:
  """Whether the model has a chat template."""
  try:
    create(model=model, messages=[{"role": "user", "content": prompt}], max_tokens=1)
  except refused as e:
    assert "chat template" in str(e), e
    return False
  return True


def with_litellm(url: str, key: str, model: str, prompt: str):
  import litellm
  litellm.suppress_debug_info = True
  where = {"api_base": url, "api_key": key}
  plain = litellm.text_completion(model=f"text-completion-openai/{model}", prompt=prompt, **where, **SETTINGS)
  yield "completion", plain.choices[0].text
  stream = litellm.text_completion(model=f"text-completion-openai/{model}", prompt=prompt, stream=True, **where, **SETTINGS)
  yield "completion, streamed", "".join(p.choices[0].text or "" for p in stream)
  create = lambda model, **more: litellm.completion(model=f"openai/{model}", **more, **where)
  if chats(create, litellm.BadRequestError, model, prompt):
    messages = [{"role": "user", "content": prompt}]
    yield "chat", create(model, messages=messages, **SETTINGS).choices[0].message.content
    stream = create(model, messages=messages, stream=True, **SETTINGS)
    yield "chat, streamed", "".join(p.choices[0].delta.content or "" for p in stream)


def with_langchain(url: str, key: str, model: str, prompt: str):
  from langchain_openai import ChatOpenAI, OpenAI
  import openai
  settings = {"model": model, "base_url": url, "api_key": key, "max_retries": 0, **SETTINGS}
  plain = OpenAI(**settings)
  yield "completion", plain.invoke(prompt)
  yield "completion, streamed", "".join(plain.stream(prompt))
  if chats(lambda **more: ChatOpenAI(**settings).invoke(more["messages"]), openai.BadRequestError, model, prompt):
    chat = ChatOpenAI(**settings)
    yield "chat", chat.invoke(prompt).content
    yield "chat, streamed", "".join(p.content for p in chat.stream(prompt))


def with_vllm(file: str, url: str, model: str, prompt: str):
  """What `vllm bench serve --backend=openai --ignore-eos --temperature=0 --top-k=-1` sends, 16 calls at once, by its own code."""
  import asyncio
  import importlib.util

  import aiohttp
  spec = importlib.util.spec_from_file_location("endpoint_request_func", file)
  theirs = sys.modules["endpoint_request_func"] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(theirs)

  async def calls():
    wanted = theirs.RequestFuncInput(prompt=prompt, api_url=f"{url}/completions", prompt_len=1, output_len=24, model=model,
                                     ignore_eos=True, extra_body={"temperature": 0.0, "top_k": -1, "min_p": 0.0})
    async with aiohttp.ClientSession() as session:
      return await asyncio.gather(*(theirs.ASYNC_REQUEST_FUNCS["openai"](wanted, session) for _ in range(16)))

  for said in asyncio.run(calls()):
    assert said.success and said.output_tokens == 24 and said.ttft > 0, said.error
  yield "16 calls at once", said.generated_text


CLIENTS = {"openai": with_openai, "litellm": with_litellm, "langchain-openai": with_langchain}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
  parser.add_argument("--key", default="none", help="the server's API key")
  parser.add_argument("--model", default="", help="its name; asked for if not given")
  parser.add_argument("--prompt", default="5+5-7-9+1>")
  parser.add_argument("--vllm", default="", help="vLLM's endpoint_request_func.py")
  parser.add_argument("--out", help="a file for the lines, besides stdout")
  args = parser.parse_args()
  lines, failed = [], False
  clients = dict(CLIENTS)
  if args.vllm:
    clients["vllm's request functions"] = lambda url, key, model, prompt: with_vllm(args.vllm, url, model, prompt)
  for name, run in clients.items():
    try:
      client = f"{name} {importlib.metadata.version(name)}" if name in CLIENTS else name
    except importlib.metadata.PackageNotFoundError:
      lines.append({"client": name, "skipped": "not installed"})
      continue
    texts = {}
    try:
      model = args.model or asked_for(args)
      for case, text in run(args.url, args.key, model, args.prompt):
        texts[case] = text
        lines.append({"client": client, "case": case, "text": text})
        if case.endswith(", streamed"):
          assert text == texts[case.removesuffix(", streamed")], f"{case}: another text than whole"
    except Exception as e:
      failed = True
      lines.append({"client": client, "failed": " ".join(f"{type(e).__name__}: {e}".split())[:400]})
  text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  print(text, end="", flush=True)
  if args.out:
    Path(args.out).write_text(text)
  sys.exit(failed)


def asked_for(args) -> str:
  import urllib.request
  request = urllib.request.Request(f"{args.url}/models", headers={"Authorization": f"Bearer {args.key}"})
  with urllib.request.urlopen(request, timeout=30) as answer:
    return json.load(answer)["data"][0]["id"]


if __name__ == "__main__":
  main()
