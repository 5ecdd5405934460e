// Messages and the list of conversations, as DOM.

import { element, show } from "/markdown.js";

/** An answer's text in its two parts; a template may have opened the thinking itself. */
export function parts(message) {
  let { content, thinking = "" } = message;
  const end = content.indexOf("</think>");
  const start = content.match(/^\s*<think>/);
  if (end >= 0) {
    thinking += content.slice(start ? start[0].length : 0, end);
    content = content.slice(end + "</think>".length);
  } else if (start) {
    thinking += content.slice(start[0].length);
    content = "";
  }
  return { thinking: thinking.trim(), content: content.trimStart() };
}

const action = (name, label) => {
  const made = element("button", { type: "button", className: "quiet", textContent: label });
  made.dataset.action = name;
  return made;
};

/** An empty frame for a message; `update` fills it. */
export function frame(message, index) {
  const user = message.role === "user";
  const body = element("div", { className: "body" });
  const actions = element("div", { className: "actions" });
  if (user) actions.append(action("edit", "Edit"));
  else actions.append(element("span", { className: "faint stats" }), action("copy", "Copy"), action("regenerate", "Regenerate"));
  const made = element("article", { className: message.role }, body, actions);
  made.setAttribute("aria-label", user ? "You" : "Answer");
  made.dataset.index = index;
  return made;
}

/** The one line of a class under a message: shown with this text, or not there. */
function line(body, className, text) {
  let made = body.querySelector(`:scope > .${className}`);
  if (text && !made) body.append((made = element("p", { className })));
  if (text) made.textContent = text;
  else made?.remove();
}

/** Bring a frame up to date with its message. */
export function update(made, message, running) {
  const body = made.querySelector(".body");
  made.classList.toggle("running", running);
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  const { thinking, content } = parts(message);
  let details = body.querySelector(".thinking");
  if (thinking && !details) {
    details = element("details", { className: "thinking" }, element("summary"), element("div"));
    body.prepend(details);
  }
  if (details) {
    details.firstElementChild.textContent = running && !content ? "Thinking…" : "Thinking";
    show(details.lastElementChild, thinking);
  }
  let text = body.querySelector(".text");
  if (!text) body.append((text = element("div", { className: "text" })));
  show(text, content);
  line(body, "note", message.note);
  line(body, "error", message.error);
  made.querySelector(".stats").textContent = message.stats ?? "";
}

/** Replace a message by a box to edit it. finish(text) gets the new text, or null. */
export function edit(made, message, finish) {
  const box = element("textarea", { value: message.content, rows: 3 });
  box.setAttribute("aria-label", "Edit message");
  const save = element("button", { type: "button", className: "accent", textContent: "Send" });
  const cancel = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
  const form = element("div", { className: "edit" }, box, element("div", { className: "row end" }, cancel, save));
  const done = (text) => {
    form.replaceWith(body, actions);
    finish(text);
  };
  const [body, actions] = [made.querySelector(".body"), made.querySelector(".actions")];
  body.remove();
  actions.replaceWith(form);
  save.onclick = () => box.value.trim() && done(box.value.trim());
  cancel.onclick = () => done(null);
  box.onkeydown = (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      done(null);
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      save.click();
    }
  };
  box.focus();
}

/** The list at the side. act(name, chat, row) is told what was asked for. */
export function conversations(list, chats, current, act) {
  list.replaceChildren(
    ...chats.map((chat) => {
      const title = chat.title || "New chat";
      const open = element("button", { type: "button", className: "open", textContent: title });
      if (chat.id === current) open.setAttribute("aria-current", "true");
      const rename = element("button", { type: "button", className: "icon", textContent: "✎" });
      const remove = element("button", { type: "button", className: "icon", textContent: "×" });
      rename.setAttribute("aria-label", `Rename ${title}`);
      remove.setAttribute("aria-label", `Delete ${title}`);
      const row = element("li", {}, open, rename, remove);
      open.onclick = () => act("open", chat, row);
      rename.onclick = () => act("rename", chat, row);
      remove.onclick = () => act("remove", chat, row);
      return row;
    }),
  );
}

/** Rename in place. */
export function rename(row, chat, finish) {
  const input = element("input", { value: chat.title, maxLength: 80 });
  input.setAttribute("aria-label", "Name of the conversation");
  let open = true;
  const done = (title) => {
    if (!open) return;
    open = false;
    finish(title);
  };
  input.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) done(input.value.trim());
    if (event.key === "Escape") done("");
  };
  input.onblur = () => done(input.value.trim());
  row.replaceChildren(input);
  input.select();
}
