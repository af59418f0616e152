"""Stream an answer and show α and the expert of each token."""

from edge_dlf import FusedLlama

with FusedLlama.from_family("demo", n_ctx=512) as llm:
    prompt = llm.apply_chat_template([{"role": "user", "content": "How many legs do 3 spiders and 2 dogs have?"}])
    for token in llm.stream(prompt, temperature=0):
        print(f"{token.text!r:12} α = {token.alpha or 0:.1f}  {token.expert or ''}", flush=True)
