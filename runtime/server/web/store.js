// Conversations and settings, kept in this browser: one localStorage entry a conversation.

const CHAT = "halfbyte.chat.";
const SETTINGS = "halfbyte.settings";
const FORMAT = "halfbyte-conversations";

/** Sampling settings: request field, label, and the range the server accepts. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "1" },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01, hint: "1" },
  { name: "top_k", label: "Top-k", min: 0, max: 2147483647, step: 1, hint: "off" },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, hint: "0" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.1, max: 10, step: 0.05, hint: "1" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 2147483647, step: 1, hint: "what fits" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, hint: "random" },
];

export const create = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", system: "", messages: [], changed: Date.now() });

/** Every conversation, the latest first. Entries that do not parse are left alone. */
export function all() {
  const found = [];
  for (const name of Object.keys(localStorage)) {
    if (!name.startsWith(CHAT)) continue;
    const chat = checked(read(name));
    if (chat) found.push(chat);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** Throws where the browser's room is used up. */
export function save(chat) {
  localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
}

export const remove = (chat) => localStorage.removeItem(CHAT + chat.id);

export function settings() {
  const kept = read(SETTINGS) ?? {};
  return Object.fromEntries(FIELDS.filter(({ name }) => Number.isFinite(kept[name])).map(({ name }) => [name, kept[name]]));
}

export const saveSettings = (values) => localStorage.setItem(SETTINGS, JSON.stringify(values));

export const exported = () => JSON.stringify({ format: FORMAT, version: 1, conversations: all() }, null, 1);

/** Add the conversations of an exported file; those with a known id are replaced. Returns how many. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new Error("This file holds no halfbyte conversations.");
  const chats = file.conversations.map(checked);
  if (chats.includes(null)) throw new Error("A conversation in this file is damaged; nothing was imported.");
  chats.forEach(save);
  return chats.length;
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

/** A conversation with just the fields we know, or null where it is none. */
function checked(value) {
  if (typeof value?.id !== "string" || !Array.isArray(value.messages)) return null;
  const messages = [];
  for (const m of value.messages) {
    if (!["user", "assistant"].includes(m?.role) || typeof m.content !== "string") return null;
    const message = { role: m.role, content: m.content };
    for (const name of ["thinking", "stats", "note", "error"]) if (typeof m[name] === "string") message[name] = m[name];
    messages.push(message);
  }
  return { id: value.id, title: String(value.title ?? ""), system: String(value.system ?? ""), messages, changed: Number(value.changed) || 0 };
}
