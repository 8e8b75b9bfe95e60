'use strict';
// The data that the page carries: an index at once, chunks (deflate, base64) when they are looked at.

const INDEX = JSON.parse(document.getElementById('index').textContent);
const decoded = new Map();

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return JSON.parse(await new Response(stream).text());
}

// A chunk's value; the latest few hundred stay decoded.
function chunk(number) {
  if (!decoded.has(number)) {
    if (decoded.size > 300) decoded.delete(decoded.keys().next().value);
    decoded.set(number, inflate(document.getElementById(`chunk-${number}`).textContent));
  }
  return decoded.get(number);
}

const numbers = (packed) => packed.values.map((value) => value * packed.unit);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// The score of each text of a sequence: its tokens' together.
function scoresOfTexts(sequence, tokens) {
  const values = numbers(tokens);
  if (!sequence.spans) return values.slice(0, sequence.texts.length);
  let start = 0;
  return sequence.spans.map((span) => sum(values.slice(start, (start += span))));
}
