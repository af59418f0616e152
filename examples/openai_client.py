"""Ask a running server by OpenAI's client: `edge-dlf serve demo`, then `OPENAI_BASE_URL=http://127.0.0.1:8080/v1`."""

import os

from openai import OpenAI

client = OpenAI(api_key=os.environ.get("EDGE_DLF_API_KEY", "none"))
stream = client.chat.completions.create(
    model="demo",
    messages=[{"role": "user", "content": "Sort these numbers from smallest to largest: 34, 13, 94"}],
    stream=True,
    temperature=0,
    extra_body={"edge_dlf": {"method": "dynamic"}},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
