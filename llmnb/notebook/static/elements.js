// What every page of ours is made of. This text stands in front of each of them (see page.py).

const ids = { next: 0 };

// Lab's one-letter commands must not act while a control of ours has the focus. Text fields are left alone by Lab.
function element(tag, name = "", attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (tag === "button" || tag === "select" || attributes.type === "checkbox") node.setAttribute("data-lm-suppress-shortcuts", "true");
  if (tag === "button") node.type = "button";
  node.append(...children);
  return node;
}

// Words change in place, and only when they differ, so that nothing moves and no screen reader repeats itself.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function number(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}
