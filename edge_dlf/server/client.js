
"use strict";
// The server: models on offer, and answers token by token.

let key = "";

async function ask(path, options = {}) {
  const headers = {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
  const response = await fetch(path, {...options, headers});
  if (response.ok) return response;
  if (response.status === 401) { $("#key").hidden = false; $("#key").focus(); }
  const error = await response.json().catch(() => ({}));
  throw new Error(error.error?.message ?? `the server answered ${response.status}`);
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Fill in `answer` while its tokens come, and call `show` with each of them.
async function receive(answer, body, signal, show) {
  const begun = performance.now();
  let first = 0;
  try {
    const response = await ask("v1/chat/completions", {method: "POST", body: JSON.stringify(body), signal});
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const {delta, finish_reason: reason} = chunk.choices[0];
      if (delta.content !== undefined || delta.reasoning_content) {
        first ||= performance.now();
        answer.tokens.push(tokenOf(delta, chunk.edge_dlf));
        show(answer.tokens.at(-1));
      }
      if (reason) {
        answer.figures = figuresOf(answer.tokens, chunk.edge_dlf.generation_tps, reason);
        answer.wait = `first token after ${((first - begun) / 1000).toFixed(1)} s`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") answer.figures = "stopped";
    else answer.error = error.message;
  }
}

// What the page keeps of a token. chance, alone: its probability in the fusion, and by the large model alone, null where
// that is small. instead: what the large model would have said.
function tokenOf({content, reasoning_content: thought}, {alpha, expert, logprob, changed, large}) {
  const chanceOf = (logprob) => logprob === null ? null : rounded(Math.exp(logprob));
  return {
    text: content ?? "", ...(thought && {thought}),
    ...(expert && {alpha: rounded(alpha), expert, chance: chanceOf(logprob), ...(large && {alone: chanceOf(large.logprob)})}),
    ...(expert && changed && {instead: large.choice}),
  };
}

function rounded(x) { return Math.round(x * 1000) / 1000; }

function figuresOf({length: n}, tps, reason) {
  return [n === 1 ? "1 token" : `${n} tokens`, tps && `${tps.toFixed(1)} tokens/s`, reason === "length" && "cut short"].filter(Boolean).join(" · ");
}
