"""Answer many prompts at once, and count for each method how many answers are right."""

from edge_dlf import FusedLlama

RIGHT = {f"What is {a} plus {b}?": f"The answer is {a + b}." for a in (14, 23, 35, 47) for b in (11, 28, 40)}
ROWS = [{"id": question, "messages": [{"role": "user", "content": question}]} for question in RIGHT]

with FusedLlama.from_family("demo", n_ctx=512, n_parallel=8) as llm:
    for method in ("large", "sums", "dynamic"):
        n_right = 0
        for row in llm.batch(ROWS, method=method, temperature=0, max_tokens=16):
            answer = row["response"]["body"]["choices"][0]["message"]["content"]
            n_right += answer.strip() == RIGHT[row["custom_id"]]
        print(f"{method:8} {n_right} of {len(ROWS)} right")
