// Talks to the server this page came from, in OpenAI's dialect.

const KEY = "halfbyte.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch { /* storage is off */ }

export class ApiError extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch { /* then it lasts until a reload */ }
}

async function call(path, options = {}) {
  const headers = { ...(options.body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not ours: the status says enough */ }
  throw new ApiError(error.message ?? `The server answered ${response.status}.`, response.status, error.code);
}

/** The served model: {id, context_length}. */
export async function model() {
  return (await (await call("/v1/models")).json()).data[0];
}

/** Gauges and counters of /metrics that have no labels: {name: number}. */
export async function metrics() {
  const text = await (await call("/metrics")).text();
  const found = {};
  for (const [, name, value] of text.matchAll(/^halfbyte_(\w+) (\S+)$/gm)) found[name] = Number(value);
  return found;
}

/** Stream a chat completion; yields {text, thinking} pieces, then {reason} and {usage}. */
export async function* chat(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500, chunk.error.code);
    if (chunk.usage) yield { usage: chunk.usage, timings: chunk.timings };
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const { content, reasoning_content: thinking } = choice.delta ?? {};
    if (content || thinking) yield { text: content ?? "", thinking: thinking ?? "" };
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
  throw new ApiError("The answer broke off: the connection closed early.", 0);
}

/** The data of every server-sent event of a stream of bytes. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
