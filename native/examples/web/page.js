// The page: a conversation with the model in worker.js.

const MODEL = "model.hb"; // beside the page; ?model=NAME takes another from there
const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

let chats = false; // whether the model takes turns; others continue a text
let messages = [];
let running = null; // the article that grows
let name = "";

const status = (text, wrong = false) => {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
};

function article(role, content) {
  const element = document.createElement("article");
  element.className = role;
  element.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const text = element.appendChild(document.createElement("span"));
  text.className = "text";
  text.textContent = content;
  $("empty").hidden = true;
  $("log").append(element);
  return element;
}

const atEnd = () => document.documentElement.scrollHeight - scrollY - innerHeight < 80;
const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);

function clear() {
  messages = [];
  document.querySelectorAll("article").forEach((a) => a.remove());
  $("empty").hidden = false;
}

function busy(on) {
  $("send").hidden = on, $("stop").hidden = !on;
  $("pick").disabled = $("clear").disabled = on;
}

function opened({ name: given, chats: turns, room, bytes, memory }) {
  chats = turns;
  clear();
  $("model").textContent = `${given || name} · ${megabytes(bytes)}`;
  $("prompt").placeholder = chats ? "Write a message" : "Begin a text";
  $("hint").textContent = chats ? "What you write does not leave this device."
    : "This model has not learned to chat: it continues what you write. Nothing leaves this device.";
  $("progress").hidden = true;
  $("send").disabled = false;
  status(`Ready · ${room} positions · memory ${megabytes(memory)}`);
  $("prompt").focus();
}

function done({ finish, prompt, tokens, rate, wait, memory }) {
  const how = { length: "reached most tokens", context: "the context is full", stopped: "stopped", stop: "" }[finish];
  const stats = document.createElement("div");
  stats.className = "stats faint";
  stats.textContent = [`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`, `${tokens} tokens`,
    `${wait.toFixed(2)} s to the first`, how].filter(Boolean).join(" · ");
  running.append(stats);
  running.classList.remove("running");
  messages.push({ role: "assistant", content: running.querySelector(".text").textContent });
  running = null;
  busy(false);
  status(`${prompt} tokens of prompt · memory ${megabytes(memory)}`);
}

function failed(text) {
  status(text, true);
  $("progress").hidden = true;
  if (!running) return;
  running.remove(), running = null;
  messages.pop();
  busy(false);
}

worker.onmessage = ({ data }) => {
  if (data.kind === "opened") opened(data);
  else if (data.kind === "error") failed(data.text);
  else {
    const follow = atEnd();
    if (data.kind === "text") running.querySelector(".text").append(data.text);
    else done(data);
    if (follow) toEnd();
  }
};
worker.onerror = (event) => failed(event.message || "the worker did not start");

function open(buffer) {
  $("send").disabled = true;
  status("Checking the model");
  worker.postMessage({ open: buffer }, [buffer]);
}

async function fetchModel(path) {
  name = path;
  $("progress").hidden = false;
  status(`Loading ${path}`);
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`there is no ${path} beside this page: open a model`);
  const total = Number(answer.headers.get("content-length")), parts = [];
  let bytes = 0;
  for (const reader = answer.body.getReader(); ;) {
    const { done: end, value } = await reader.read();
    if (end) break;
    parts.push(value), bytes += value.length;
    if (total) $("progress").value = bytes / total;
  }
  open(await new Blob(parts).arrayBuffer());
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("prompt").value;
  if (!content.trim() || running || $("send").disabled) return;
  $("prompt").value = "";
  messages.push({ role: "user", content });
  if (chats) article("user", content);
  running = article("assistant", "");
  if (!chats) { // one text, of two writers
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = content;
    running.prepend(given);
  }
  running.classList.add("running");
  busy(true);
  status("");
  toEnd();
  const number = (id) => ($(id).validity.valid ? Number($(id).value) : Number($(id).defaultValue));
  worker.postMessage({ say: chats ? messages : messages.slice(-1), most: number("most"),
    sampling: { temperature: number("temperature"), top_k: 0, top_p: number("top_p"), seed: number("seed") } });
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
const stop = () => running && worker.postMessage({ stop: true });
$("stop").addEventListener("click", stop);
addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("clear").addEventListener("click", clear);
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  name = file.name;
  open(await file.arrayBuffer());
});

const themes = ["system", "light", "dark"];
$("theme").addEventListener("click", () => {
  const root = document.documentElement.dataset;
  root.theme = themes[(themes.indexOf(root.theme || "system") + 1) % 3];
  $("theme").setAttribute("aria-label", `Theme: ${root.theme}`);
});

const wanted = new URLSearchParams(location.search).get("model") || MODEL;
fetchModel(new URL(wanted, location.href).origin === location.origin ? wanted : MODEL)
  .catch((error) => failed(error.message));
