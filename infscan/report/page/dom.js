// Everything that is shown goes through here: elements are made by name, and data only ever becomes text.

const $ = (id) => document.getElementById(id);

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    made.setAttribute(key, value === true ? '' : value);
  }
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// What cannot be seen is spelt out: controls, marks that turn or hide text. Joiners stay, which scripts and emoji need.
const UNSEEN = /[\p{Cc}\p{Cf}\u2028\u2029]/u;
const JOINERS = new Set(['\u200c', '\u200d']);
const NAMES = { '\n': '↵', '\r': '␍', '\t': '⇥', '\u2028': '↵', '\u2029': '¶' };

function spelt(character) {
  return NAMES[character] ?? `⟨${character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}⟩`;
}

// Appends a text to an element. breaks: whether a line break also breaks the line.
function show(parent, text, breaks = false) {
  if (!UNSEEN.test(text)) {
    parent.append(text);
    return parent;
  }
  let plain = '';
  for (const character of text) {
    if (!UNSEEN.test(character) || JOINERS.has(character)) {
      plain += character;
      continue;
    }
    parent.append(plain, el('span', { class: 'unseen' }, spelt(character)));
    plain = breaks && character === '\n' ? '\n' : '';
  }
  parent.append(plain);
  return parent;
}

// The same as a plain string, for labels.
function line(text, most = 80) {
  const short = text.length > most ? `${text.slice(0, most)}…` : text;
  return Array.from(short, (c) => (UNSEEN.test(c) && !JOINERS.has(c) ? spelt(c) : c)).join('');
}

function number(value, digits = 4) {
  if (value === 0) return '0';
  const size = Math.abs(value);
  const text = size >= 1e7 || size < 1e-4 ? size.toExponential(digits - 1) : Number(size.toPrecision(digits)).toLocaleString('en', { maximumFractionDigits: 8 });
  return (value < 0 ? '−' : '+') + text;
}

const percent = (share) => `${(100 * share).toFixed(Math.abs(share) < 0.1 ? 1 : 0)} %`;
const plural = (count, one, many = `${one}s`) => `${count.toLocaleString('en')} ${count === 1 ? one : many}`;
