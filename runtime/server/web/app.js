// The page: which conversation is open, and the one answer that may be running.

import * as api from "/api.js";
import * as dialogs from "/dialogs.js";
import * as store from "/store.js";
import * as view from "/view.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const box = $("prompt");
let chats = store.all();
let chat = chats[0] ?? store.create();
let running = null; // {chat, message, abort}
let servedModel = null;

// ---- showing ----

function render() {
  $("title").textContent = chat.title || "New chat";
  document.title = `${chat.title || "New chat"} · halfbyte`;
  view.conversations($("conversations"), chats, chat.id, onList);
  log.replaceChildren(...chat.messages.map((message, i) => {
    const made = view.frame(message, i);
    view.update(made, message, running?.message === message);
    return made;
  }));
  document.body.classList.toggle("empty", !chat.messages.length);
  $("send").hidden = !!running;
  $("stop").hidden = !running;
}

let painting = false;
function paint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    if (!running || running.chat !== chat) return;
    const follow = atEnd();
    view.update(log.lastElementChild, running.message, true);
    if (follow) toEnd();
  });
}

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
const toEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function keep(kept = chat) {
  kept.changed = Date.now();
  try {
    store.save(kept);
  } catch {
    dialogs.toast("This browser's room is full: export and delete some conversations.");
  }
  chats = [kept, ...chats.filter((c) => c.id !== kept.id)];
}

// ---- answers ----

function send(text) {
  if (running) return;
  chat.messages.push({ role: "user", content: text });
  chat.title ||= shortened(text.replace(/\s+/g, " "), 48);
  answer();
}

const shortened = (text, length) => text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text;

/** Drop messages from an index on, and say so with a way back. */
function truncate(index, what) {
  const [dropped, of] = [chat.messages.slice(index), chat];
  chat.messages.length = index;
  return () => dialogs.toast(what, () => {
    if (running?.chat === of) running.abort.abort();
    of.messages.splice(index, Infinity, ...dropped);
    keep(of);
    open(of);
  });
}

async function answer() {
  const messages = outgoing();
  const message = { role: "assistant", content: "" };
  const mine = (running = { chat, message, abort: new AbortController() });
  chat.messages.push(message);
  keep();
  render();
  toEnd();
  $("announce").textContent = "Answering";
  const clock = { start: performance.now(), first: 0, last: 0, saved: performance.now(), pieces: 0, usage: null, timings: null };
  try {
    await fitted(messages, mine, clock);
  } catch (error) {
    if (error.name !== "AbortError") message.error = error.message;
    if (error.status === 401) askKey();
  }
  const tokens = clock.usage?.completion_tokens ?? clock.pieces;
  message.stats = speed(tokens, clock);
  const follow = atEnd();
  running = null;
  if (mine.chat.messages.includes(message)) keep(mine.chat);
  const focused = document.activeElement === $("stop");
  render();
  if (follow) toEnd();
  if (focused) box.focus();
  $("announce").textContent = message.error ?? `Answer: ${view.parts(message).content}`;
  memory();
}

function outgoing() {
  // a message that found no answer is left out with it, as many templates want roles to alternate
  const messages = chat.messages.filter((m, i) => m.role === "user" ? chat.messages[i + 1]?.content !== "" : m.content)
    .map((m) => ({ role: m.role, content: m.role === "user" ? m.content : view.parts(m).content }));
  return chat.system ? [{ role: "system", content: chat.system }, ...messages] : messages;
}

/** Stream the answer to what fits the context: the oldest turns are left out, never the system prompt, and it is said. */
async function fitted(messages, mine, clock) {
  const first = chat.system ? 1 : 0;
  for (let left = 0; ; left += 2) {
    try {
      const body = { model: servedModel?.id ?? "", ...store.settings(), messages };
      await stream(body, mine, clock);
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || messages.length - first < 3) {
        delete mine.message.note;
        throw error;
      }
      messages.splice(first, 2);
      mine.message.note = `The context is full: the first ${left + 2} messages were left out.`;
    }
  }
}

async function stream(body, { chat: of, message, abort }, clock) {
  for await (const piece of api.chat(body, abort.signal)) {
    if (piece.usage) [clock.usage, clock.timings] = [piece.usage, piece.timings];
    if (piece.reason === "length") message.note = [message.note, "The answer ends here: it reached max tokens or the end of the context."].filter(Boolean).join(" ");
    if (piece.text === undefined) continue;
    message.content += piece.text;
    if (piece.thinking) message.thinking = (message.thinking ?? "") + piece.thinking;
    clock.last = performance.now();
    clock.first ||= clock.last;
    clock.pieces += 1;
    if (clock.last - clock.saved > 1000) {
      clock.saved = clock.last;
      keep(of);
    }
    paint();
  }
}

/** "41.2 tokens/s · 120 tokens · 0.31 s to the first": the speed is the server's; pieces arrive in bursts. */
function speed(tokens, { start, first, last, timings }) {
  if (!first) return "";
  const words = [`${tokens} token${tokens === 1 ? "" : "s"}`, `${((first - start) / 1000).toFixed(2)} s to the first`];
  const rate = timings ? timings.predicted_per_second : tokens > 1 && last > first ? (tokens - 1) / (last - first) * 1000 : null;
  if (rate) words.unshift(`${rate.toFixed(1)} tokens/s`);
  return words.join(" · ");
}

async function memory() {
  try {
    const { kv_bytes: held, resident_bytes: whole } = await api.metrics();
    const mb = (n) => `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`;
    $("stats").textContent = `${mb(whole)} of memory, ${mb(held)} of it for conversations`;
  } catch {
    $("stats").textContent = "";
  }
}

async function connect() {
  try {
    servedModel = await api.model();
    $("model").textContent = servedModel.id;
    memory();
  } catch (error) {
    if (error.status === 401) askKey();
    else dialogs.toast(error.message);
  }
}

let asking = false;
async function askKey() {
  if (asking) return;
  asking = true;
  const key = await dialogs.key();
  asking = false;
  if (key === null) return;
  api.setKey(key);
  connect();
}

// ---- conversations ----

function open(other) {
  chat = other;
  drawer(false);
  render();
  toEnd();
}

function onList(what, chosen, row) {
  if (what === "open") {
    open(chosen);
    box.focus();
  } else if (what === "rename") {
    view.rename(row, chosen, (title) => {
      if (title) {
        chosen.title = title;
        keep(chosen);
      }
      render();
    });
  } else {
    if (running?.chat === chosen) return dialogs.toast("Stop the answer first.");
    store.remove(chosen);
    chats = chats.filter((c) => c !== chosen);
    if (chat === chosen) chat = chats[0] ?? store.create();
    render();
    box.focus();
    dialogs.toast("Conversation deleted.", () => {
      keep(chosen);
      open(chosen);
    });
  }
}

function fresh() {
  open(chat.messages.length ? store.create() : chat);
  box.focus();
}

// ---- controls ----

const narrow = matchMedia("(max-width: 720px)");
function drawer(shown) {
  document.body.classList.toggle("drawer", shown);
  $("menu").setAttribute("aria-expanded", shown);
  $("scrim").hidden = !shown;
  $("sidebar").inert = narrow.matches && !shown;
}
narrow.onchange = () => drawer(false);
$("menu").onclick = () => {
  drawer(true);
  $("new").focus();
};
$("scrim").onclick = () => drawer(false);
$("new").onclick = fresh;
$("stop").onclick = () => running?.abort.abort();
$("open-settings").onclick = () => dialogs.settings(chat, (system) => {
  chat.system = system;
  if (chat.messages.length) keep();
});

const grow = () => {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`;
};
box.oninput = grow;
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (!text || running) return;
  box.value = "";
  grow();
  send(text);
};
box.onkeydown = (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !box.value) {
    log.querySelector("article.user:last-of-type, article.user:nth-last-of-type(2)")?.querySelector("[data-action=edit]")?.click();
  }
};
document.onkeydown = (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("drawer")) {
      drawer(false);
      $("menu").focus();
    } else running?.abort.abort();
  }
  if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    fresh();
  }
};

async function copy(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}

log.onclick = ({ target }) => {
  if (target.dataset?.copy !== undefined) return copy(target, target.dataset.copy);
  const what = target.dataset?.action;
  if (!what) return;
  const made = target.closest("article");
  const index = Number(made.dataset.index);
  const message = chat.messages[index];
  if (what === "copy") return copy(target, view.parts(message).content);
  if (running) return dialogs.toast("Stop the answer first.");
  if (what === "regenerate") {
    const offer = truncate(index, "Answered anew.");
    answer();
    offer();
  } else {
    view.edit(made, message, (text) => {
      box.focus();
      if (text === null || running) return;
      const offer = truncate(index, "Went on from the edited message.");
      send(text);
      offer();
    });
  }
};

const THEMES = ["", "light", "dark"];
function theme(next) {
  document.documentElement.dataset.theme = next;
  $("theme").setAttribute("aria-label", `Theme: ${next || "system"}`);
  $("theme").title = `Theme: ${next || "system"}`;
}
$("theme").onclick = () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length];
  localStorage.setItem("halfbyte.theme", next);
  theme(next);
};

$("export").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "halfbyte-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = async ({ target }) => {
  try {
    const count = store.imported(await target.files[0].text());
    chats = store.all();
    chat = chats.find((c) => c.id === chat.id) ?? chats[0] ?? chat;
    render();
    dialogs.toast(`${count} conversations imported.`);
  } catch (error) {
    dialogs.toast(error.message);
  }
  target.value = "";
};
addEventListener("pagehide", () => running && keep(running.chat));

theme(document.documentElement.dataset.theme ?? "");
drawer(false);
render();
toEnd();
box.focus();
connect();
