"""Get an answer that keeps a form. A grammar says which texts are allowed; `json_schema={…}` asks for JSON."""

from edge_dlf import FusedLlama

GRAMMAR = r'root ::= "The answer is " [1-9] [0-9]? [0-9]? "."'

with FusedLlama.from_family("demo", n_ctx=512) as llm:
    question = [{"role": "user", "content": "What is 35 plus 40?"}]
    for form in ({}, {"grammar": GRAMMAR}):
        answer = llm.create_chat_completion(question, method="large", temperature=0, max_tokens=16, **form)
        print(repr(answer["choices"][0]["message"]["content"]))
