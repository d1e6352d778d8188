// Building blocks. All text reaches the page as text nodes; nothing here or elsewhere parses markup.

// An element: attributes by name, `on…` listeners, `vars` as CSS custom properties, children as text or nodes.
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "vars") {
      for (const [key, number] of Object.entries(value)) element.style.setProperty(`--${key}`, String(number));
    } else if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const child of children.flat(Infinity)) {
    if (child !== undefined && child !== null && child !== false) element.append(child);
  }
  return element;
}

// Text of a model with line breaks, control and bidirectional characters and odd spaces spelled out.
const UNSEEN = /(?![\u200c\u200d])[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
const SPELLED = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };

function visible(text) {
  return text.replace(
    UNSEEN,
    (character) => SPELLED[character] || `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`,
  );
}

// A token that stands alone: its leading space matters to the model, and is shown as a low bracket.
function token(text) {
  const shown = visible(text);
  return shown.startsWith(" ") ? [h("span", { class: "space" }, "␣"), shown.slice(1)] : shown || "∅";
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function count(number) {
  return plain.format(number);
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

function signed(number, digits = 2) {
  return (number >= 0 ? "+" : "−") + Math.abs(number).toFixed(digits);
}

function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// A colour of the style sheet, as the theme has it now.
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
