// Settings, the API key, and the line that offers Undo.

import { element } from "/markdown.js";
import * as store from "/store.js";

const $ = (id) => document.getElementById(id);
const inputs = store.FIELDS.map(({ name, label, min, max, step, hint }) => {
  const input = element("input", { id: name, type: "number", min, max, step: step < 1 ? "any" : step, placeholder: hint });
  $("sampling").append(element("div", {}, element("label", { htmlFor: name, textContent: label }), input));
  return input;
});

/** Show the settings; saved(system) is called when they are closed by Done. */
export function settings(chat, saved) {
  const dialog = $("settings");
  const values = store.settings();
  for (const input of inputs) input.value = values[input.id] ?? "";
  $("system").value = chat.system;
  $("settings-reset").onclick = () => inputs.forEach((input) => (input.value = ""));
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault(); // fields out of range never get here: the browser says what is wrong
    store.saveSettings(Object.fromEntries(inputs.filter((i) => i.value !== "").map((i) => [i.id, i.valueAsNumber])));
    dialog.close();
    saved($("system").value.trim());
  };
  dialog.showModal();
}

/** Ask for the API key; resolves to it, or to null. */
export function key() {
  const dialog = $("key-dialog");
  return new Promise((resolve) => {
    let found = null;
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      found = $("key").value.trim();
      dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      $("key").value = "";
      resolve(found);
    };
    dialog.showModal();
  });
}

let hiding = 0;

/** A line at the foot of the page, for ten seconds; with `undo`, a button that calls it. */
export function toast(text, undo = null) {
  const line = $("toast");
  const [span, button] = line.children;
  span.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    line.hidden = true;
    undo();
  };
  line.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (line.hidden = true), 10_000);
}
