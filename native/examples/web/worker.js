// The model, off the page's thread: halfbyte.wasm, its memory, and the loop that asks for tokens.
// In: {open: ArrayBuffer} | {say: messages, sampling, most} | {stop: true}. Out: objects with one `kind`.

const ENDED = -100, FULL = -101;
const POSITIONS = 4096; // longest conversation; its keys and values are taken as it grows
const SHOWN = 30; // milliseconds between texts to the page
const ROLES = ["system", "user", "assistant"];

const wasm = WebAssembly.instantiateStreaming(fetch(new URL("halfbyte.wasm", import.meta.url)), {}).then((w) => {
  w.instance.exports._initialize();
  return w.instance.exports;
});
wasm.catch((error) => postMessage({ kind: "error", text: `halfbyte.wasm: ${error.message}` }));

let stopped = false;
let busy = Promise.resolve();

const bytesAt = (x, at, count) => new Uint8Array(x.memory.buffer, at, count);
const textAt = (x, at, count) => new TextDecoder().decode(bytesAt(x, at, count));

function lastError(x) {
  const all = new Uint8Array(x.memory.buffer), at = x.web_error();
  return textAt(x, at, all.indexOf(0, at) - at) || "the model does not fit into memory";
}

function checked(x, status) {
  if (status < 0) throw new Error(status === FULL ? "the conversation is longer than the model's context" : lastError(x));
  return status;
}

/** Bytes copied into the module's memory, which from then on are the module's. */
function put(x, bytes) {
  const at = x.web_take(bytes.length + 1);
  if (!at) throw new Error("the browser gives no more memory");
  bytesAt(x, at, bytes.length + 1).set(bytes);
  bytesAt(x, at, bytes.length + 1)[bytes.length] = 0;
  return at;
}

function metadata(x, key) {
  const at = put(x, new TextEncoder().encode(key)), count = x.web_metadata(at);
  x.web_give_back(at);
  return count < 0 ? "" : textAt(x, x.web_text(), count);
}

async function open(buffer) {
  const x = await wasm;
  x.web_close();
  checked(x, x.web_open(put(x, new Uint8Array(buffer)), buffer.byteLength, POSITIONS));
  postMessage({ kind: "opened", name: metadata(x, "general.name") || metadata(x, "general.model_type"),
    chats: Boolean(x.web_chats()), room: x.web_room(), bytes: buffer.byteLength, memory: x.memory.buffer.byteLength });
}

/** Lets messages in, so that a stop is heard. A timer would wait 4 ms a time. */
const breath = new MessageChannel();
const breathe = () => new Promise((done) => { breath.port1.onmessage = done; breath.port2.postMessage(0); });

async function say(messages, sampling, most) {
  const x = await wasm, started = performance.now();
  let held = "", shown = 0, tokens = 0, first = 0, finish = "length";
  const show = () => {
    if (held) postMessage({ kind: "text", text: held });
    held = "", shown = performance.now();
  };
  checked(x, x.web_sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed));
  x.web_start();
  for (const { role, content } of messages) {
    const bytes = new TextEncoder().encode(content);
    checked(x, x.web_message(ROLES.indexOf(role), put(x, bytes), bytes.length));
  }
  const prompt = checked(x, x.web_prompt());
  let left;
  do { // a prompt is fed in parts
    left = checked(x, x.web_feed());
    await breathe();
  } while (left && !stopped);
  while (!stopped && tokens < most) {
    const count = x.web_next();
    if (count === ENDED || count === FULL) {
      finish = count === ENDED ? "stop" : "context";
      break;
    }
    checked(x, count);
    if (!tokens++) first = performance.now();
    held += textAt(x, x.web_text(), count);
    if (performance.now() - shown > SHOWN) {
      show();
      await breathe();
    }
  }
  const rest = checked(x, x.web_finish());
  held += textAt(x, x.web_text(), rest);
  show();
  const seconds = (performance.now() - first) / 1000;
  postMessage({ kind: "done", finish: stopped ? "stopped" : finish, prompt, tokens,
    rate: tokens > 1 ? (tokens - 1) / seconds : 0, wait: first ? (first - started) / 1000 : 0,
    memory: x.memory.buffer.byteLength });
}

onmessage = ({ data }) => {
  if (data.stop) {
    stopped = true;
    return;
  }
  busy = busy.then(async () => {
    stopped = false;
    await (data.open ? open(data.open) : say(data.say, data.sampling, data.most));
  }).catch((error) => postMessage({ kind: "error", text: error.message }));
};
