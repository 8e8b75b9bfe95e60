'use strict';
// Asks, waits, and shows: first what the index says, then exact rows in its place. Data only ever becomes text.

const $ = (id) => document.getElementById(id);
const WAIT_MS = 300;
let asked = 0;

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const value = await response.json();
  if (response.status === 401) $('login').hidden = false;
  if (!response.ok) throw new Error(value.error);
  return value;
}

function say(text) { $('state').textContent = text; }

function facts(index) {
  $('facts').textContent = `${index.sequences.toLocaleString('en')} sequences of ${index.corpus}, asked of ${index.model}`;
}

const digits = (value) => (value < 0 ? '−' : '+') + Number(Math.abs(value).toPrecision(4)).toLocaleString('en');

function showRows(rows, exact) {
  const wanted = rows.filter((row) => row.side === 'proponent').slice(0, 10);
  $('rows').replaceChildren(...wanted.map((row) => {
    const item = document.createElement('li');
    const score = document.createElement('span');
    score.className = 'score';
    score.textContent = digits(exact ? row.score : row.index_score);
    item.append(score, ` sequence ${row.sequence_id}`);
    if (exact) item.append(` (${row.document_id}) `, row.text.slice(0, 300));
    return item;
  }));
}

function show(seen) {
  $('answer').hidden = false;
  const exact = seen.state === 'done';
  $('answer').dataset.state = seen.state;
  $('answer-title').textContent = exact ? 'The sequences that taught it most' : 'First, by the index (exact scores are on their way)';
  showRows(seen.rows, exact);
  $('verdict').textContent = exact ? seen.verdict : '';
  $('certificate').textContent = exact ? seen.certificate : '';
  $('links').replaceChildren();
  $('report').hidden = !exact;
  if (!exact) return;
  const link = document.createElement('a');
  link.href = `/answers/${seen.id}`;
  link.textContent = 'This answer, to keep';
  $('links').append(link, ` · run folder ${seen.run}`);
  $('report').src = `/answers/${seen.id}`;
}

async function follow(id, mine) {
  for (;;) {
    const seen = await call(`/api/questions/${id}`);
    if (mine !== asked) return;
    if (seen.state === 'failed') throw new Error(seen.error);
    if (seen.rows) show(seen);
    if (seen.state === 'done') {
      const took = seen.exact_s ? `First rows after ${seen.first_s} s, exact ones after ${seen.exact_s} s.` : 'An earlier answer.';
      say([took, ...(seen.warnings || [])].join(' '));
      return;
    }
    say(seen.state === 'waiting' ? `Waiting; ${seen.ahead} questions are ahead.` : 'Asking.');
    await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
  }
}

async function ask() {
  const mine = ++asked;
  $('answer').hidden = true;
  say('Asking.');
  try {
    const body = { prompt: $('prompt').value, completion: $('completion').value, measure: $('measure').value };
    if ($('contrast').value) body.contrast = $('contrast').value;
    const { id } = await call('/api/questions', body);
    location.hash = id;
    await follow(id, mine);
  } catch (error) {
    if (mine === asked) say(error.message);
  }
}

async function start() {
  try {
    facts(await call('/api/index'));
    $('login').hidden = true;
    const id = location.hash.slice(1);
    if (id) await follow(id, ++asked);
  } catch (error) {
    say(error.message);
  }
}

$('ask').addEventListener('submit', (event) => { event.preventDefault(); ask(); });
$('login').addEventListener('submit', async (event) => {
  event.preventDefault();
  try {
    await call('/api/login', { token: $('token').value });
    say('');
    start();
  } catch (error) {
    say(error.message);
  }
});
start();
