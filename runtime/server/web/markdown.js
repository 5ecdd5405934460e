// Markdown to DOM nodes. Text only ever becomes text nodes, so nothing a model writes is markup.

const DEPTH = 6;
// Lengths are bounded, so that no text makes matching slow.
const INLINE = new RegExp(
  [
    /(?<ticks>`{1,3})(?!`)(?<code>.{1,2000}?)(?<!`)\k<ticks>(?!`)/,
    /\*\*(?=\S)(?<strong>.{1,2000}?)(?<=\S)\*\*/,
    /~~(?=\S)(?<del>.{1,500}?)~~/,
    /(?<![\w*])\*(?=[^\s*])(?<em>.{1,1000}?)(?<=[^\s*])\*(?!\*)/,
    /(?<!\w)_(?=[^\s_])(?<under>.{1,1000}?)(?<=[^\s_])_(?!\w)/,
    /!?\[(?<label>[^\]\n]{1,500})\]\((?<url>[^()\s]{1,2000})\)/,
    /(?<bare>https?:\/\/[^\s<>"')\]]{1,2000})/,
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!~|>])/,
  ].map((r) => r.source).join("|"),
  "gs",
);
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.+?)\s*#*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^\s{0,3}>\s?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Show text in a container. Blocks whose source did not change keep their nodes, so streaming stays cheap. */
export function show(container, text) {
  const sources = blocks(text);
  sources.forEach((source, i) => {
    const old = container.children[i];
    if (old?.source === source) return;
    const fresh = block(source, 0);
    fresh.source = source;
    if (old) old.replaceWith(fresh);
    else container.append(fresh);
  });
  while (container.children.length > sources.length) container.lastElementChild.remove();
}

/** Split text into the sources of its blocks. */
export function blocks(text) {
  const found = [];
  let lines = [];
  let kind = "";
  let fence = "";
  const end = () => {
    if (lines.length) found.push(lines.join("\n"));
    lines = [];
    kind = "";
  };
  for (const line of text.replaceAll("\r", "").split("\n")) {
    if (fence) {
      lines.push(line);
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).replaceAll(fence[0], "")) {
        fence = "";
        end();
      }
      continue;
    }
    const next = kindOf(line);
    if (next === "blank") {
      if (kind === "list") lines.push("");
      else end();
      continue;
    }
    const continues = kind === next || (kind === "list" && /^\s{2,}/.test(line)) || (next === "text" && ["list", "quote"].includes(kind) && lines.at(-1) !== "");
    if (!continues || next === "heading" || next === "rule") end();
    if (!kind) kind = next;
    lines.push(line);
    if (next === "fence") fence = line.match(FENCE)[1];
  }
  end();
  return found;
}

function kindOf(line) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (ITEM.test(line)) return "list";
  return QUOTE.test(line) ? "quote" : "text";
}

function block(source, depth) {
  const lines = source.split("\n");
  switch (kindOf(lines[0])) {
    case "fence":
      return code(lines);
    case "heading": {
      const [, marks, text] = lines[0].match(HEADING);
      return element(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(text));
    }
    case "rule":
      return element("hr");
    case "list":
      return list(lines, depth);
    case "quote":
      return nested("blockquote", lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth);
    default:
      return lines.length > 1 && lines[0].includes("|") && DIVIDER.test(lines[1]) ? table(lines) : paragraph(source);
  }
}

function nested(name, text, depth) {
  const made = element(name);
  if (depth >= DEPTH) made.append(paragraph(text));
  else made.append(...blocks(text).map((source) => block(source, depth + 1)));
  return made;
}

const paragraph = (text) => element("p", {}, ...inline(text));

function code(lines) {
  const [, fence, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = element("button", { type: "button", className: "quiet copy", textContent: "Copy" });
  copy.setAttribute("aria-label", "Copy code");
  copy.dataset.copy = text;
  const pre = element("pre", { tabIndex: 0 }, element("code", { textContent: text }));
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.setAttribute("role", "region");
  return element("div", { className: "code" }, element("div", { className: "bar" }, element("span", { textContent: language }), copy), pre);
}

function list(lines, depth) {
  const [, , mark] = lines[0].match(ITEM);
  const ordered = /\d/.test(mark);
  const indent = lines[0].match(/^\s*/)[0].length;
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(mark, 10);
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(/^\s{1,4}/, ""));
  }
  for (const item of items) {
    const text = item.join("\n").trimEnd();
    const inner = nested("li", text, depth);
    const only = inner.firstElementChild;
    if (only?.tagName === "P") only.replaceWith(...only.childNodes); // a tight list
    made.append(inner);
  }
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const sides = cells(lines[1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (line, name) => element("tr", {}, ...cells(line).map((cell, i) => element(name, { className: sides[i] ?? "" }, ...inline(cell))));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const made = element("div", { className: "table", tabIndex: 0 }, element("table", {}, element("thead", {}, row(lines[0], "th")), body));
  made.setAttribute("role", "region");
  made.setAttribute("aria-label", "Table");
  return made;
}

function inline(text, depth = 0) {
  if (depth > DEPTH) return [text];
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    found.push(text.slice(at, match.index), span(match, depth));
    at = match.index + match[0].length;
  }
  found.push(text.slice(at));
  return found.filter((part) => part !== "");
}

function span(match, depth) {
  const { code: plain, strong, del, em, under, label, url, bare, escaped } = match.groups;
  if (plain) return element("code", { textContent: plain.length > 2 ? plain.replace(/^ (.*) $/s, "$1") : plain });
  if (strong) return element("strong", {}, ...inline(strong, depth + 1));
  if (del) return element("del", {}, ...inline(del, depth + 1));
  if (em || under) return element("em", {}, ...inline(em ?? under, depth + 1));
  if (escaped) return escaped;
  const address = bare ?? url;
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return match[0];
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer", textContent: bare ?? label });
}
