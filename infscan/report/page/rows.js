// One published sequence: a line of numbers and an excerpt; opened, the whole text, its layers and where it comes from.

const AROUND = 34; // texts beside an excerpt's centre
const EXCERPT = 420; // characters of an excerpt
const ONE = 120; // characters of one text in an excerpt

// Texts as coloured tokens. The colour's strength is the score's size by the row's largest.
function tokens(parent, sequence, scores, from, to, most, breaks) {
  const largest = Math.max(...scores.map(Math.abs)) || 1;
  const quiet = new Set(sequence.quiet);
  let room = most;
  for (let index = from; index < to && room > 0; index += 1) {
    const text = sequence.texts[index];
    if (!text) continue;
    const kept = breaks ? text : text.slice(0, Math.min(room, ONE));
    const share = scores[index] / largest;
    const span = el('span', { class: `t ${share < 0 ? 'neg' : 'pos'}${quiet.has(index) ? ' quiet' : ''}`, 'data-at': index });
    span.style.setProperty('--size', Math.abs(share).toFixed(3));
    show(span, kept.length < text.length ? `${kept}…` : kept, breaks);
    parent.append(span);
    room -= kept.length;
  }
  return room > 0;
}

function excerpt(row, scores, wanted) {
  const { texts } = row.sequence;
  let centre = scores.reduce((best, score, index) => (Math.abs(score) > Math.abs(scores[best]) ? index : best), 0);
  if (wanted) {
    const found = texts.join('').toLowerCase().indexOf(wanted);
    if (found >= 0) for (let index = 0, length = 0; index < texts.length; length += texts[index].length, index += 1) if (length <= found) centre = index;
  }
  const from = Math.max(0, Math.min(centre - AROUND / 2, texts.length - AROUND));
  const to = Math.min(texts.length, from + AROUND);
  const shown = el('p', { class: 'text excerpt', dir: 'auto' });
  if (from > 0) shown.append('… ');
  const whole = tokens(shown, row.sequence, scores, from, to, EXCERPT, false);
  if (!whole || to < texts.length) shown.append(' …');
  return shown;
}

function tokenSentence(row, scores, index) {
  const span = row.sequence.spans ? row.sequence.spans[index] : 1;
  const total = row.score || 1;
  const many = span > 1 ? ` (${span} tokens)` : '';
  return `“${line(row.sequence.texts[index], 40)}”${many} ${number(scores[index])}, ${percent(scores[index] / total)} of the score`;
}

function legend(scores) {
  const largest = Math.max(...scores.map(Math.abs));
  return el('p', { class: 'legend' }, `${number(-largest)} `, el('span', { class: 'ramp', 'aria-hidden': 'true' }), ` ${number(largest)} per token; dotted: lowers, underlined: raises`);
}

function provenance(row) {
  const { sequence } = row;
  const list = el('dl', { class: 'provenance' });
  const fact = (name, value) => list.append(el('dt', {}, name), show(el('dd', { dir: 'auto' }), value));
  fact('Sequence', `number ${sequence.id}, ${plural(sequence.length, 'token')}`);
  for (const [id, source, start, end] of sequence.documents) fact('Document', `${line(id, 200)}${source ? ` from ${line(source, 80)}` : ''}${sequence.documents.length > 1 ? `, tokens ${start} to ${end}` : ''}`);
  if (sequence.corpus) fact('Corpus', sequence.corpus);
  fact('In the file', line(sequence.place, 200));
  fact('Loss', `${(sequence.loss / Math.max(1, sequence.length - 1)).toPrecision(3)} nats a token`);
  return list;
}

// The whole of a row, built when it is opened.
function opened(row, scores, run) {
  const { sequence } = row;
  const said = el('p', { class: 'said', role: 'status' }, 'Point at a token, or step through them with the arrow keys.');
  const text = el('div', { class: 'text whole', dir: 'auto', tabindex: '0', role: 'group', 'aria-label': 'The whole text; left and right arrow keys step through its tokens' });
  tokens(text, sequence, scores, 0, sequence.texts.length, Infinity, true);
  const spans = [...text.children].filter((child) => child.classList.contains('t'));
  let at = -1;
  const step = (to) => {
    spans[at]?.classList.remove('at');
    at = Math.max(0, Math.min(spans.length - 1, to));
    spans[at].classList.add('at');
    spans[at].scrollIntoView({ block: 'nearest' });
    said.textContent = tokenSentence(row, scores, Number(spans[at].dataset.at));
  };
  text.addEventListener('keydown', (event) => {
    if (!spans.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    step(to);
  });
  const more = sequence.more ? [el('p', { class: 'note' }, `${plural(sequence.more, 'character')} more are in the run's sequences/.`)] : [];
  const quiet = sequence.quiet ? [el('p', { class: 'note' }, 'Pale tokens carried no loss.')] : [];
  return el('div', { class: 'opened' }, text, said, legend(scores), ...more, ...quiet, el('div', { class: 'beside' }, layerPlot('By layer', row.layers, run.layers), provenance(row)));
}

// A row's list item. best: the side's largest |score|. wanted: what was searched for. copies: shows those it stands for.
function rowItem(row, run, best, wanted, copies) {
  const scores = scoresOfTexts(row.sequence, row.tokens);
  const [document_, source] = row.document ?? row.sequence.documents[0] ?? ['', ''];
  const bar = el('span', { class: `strength ${row.score < 0 ? 'opponent' : 'proponent'}`, 'aria-hidden': 'true' }, el('span'));
  bar.firstChild.style.width = `${Math.max(1, (100 * Math.abs(row.score)) / (best || 1)).toFixed(1)}%`;
  const name = el('h3', {}, el('span', { class: 'rank' }, `${row.rank}`), bar, el('span', { class: 'score' }, number(row.score)), el('span', { class: 'scan' }, `scan ${number(row.scan)}${row.z === undefined ? '' : `, z ${number(row.z)}`}${row.similarity === undefined ? '' : `, alike ${row.similarity.toFixed(2)}`}`));
  const from = el('p', { class: 'from' }, show(el('bdi', { class: 'document' }), line(document_, 120)));
  if (source) from.append(show(el('bdi', { class: 'source' }), line(source, 60)));
  if (row.sequence.corpus) from.append(show(el('bdi', { class: 'source' }), line(row.sequence.corpus, 60)));
  if (row.unsure) from.append(el('span', { class: 'mark' }, `sign unsure: ${number(row.unsure[0])} to ${number(row.unsure[1])} after other texts`));
  if (row.effect !== undefined) from.append(el('span', { class: 'mark' }, `trained on: ${number(row.effect, 3)} nats`));
  if (row.states) from.append(el('span', { class: 'mark' }, 'states it'));
  if (row.hub) from.append(el('span', { class: 'mark' }, `hub: near the top of ${row.hub} other questions`));
  if (row.alike) from.append(el('span', { class: 'mark alike' }, `${{ exact: 'a copy of', near: 'nearly a copy of', document: 'of the same document as' }[row.alike[1]]} ${row.alike[0]}`));
  const toggle = el('button', { type: 'button', class: 'open', 'aria-expanded': 'false' }, 'Open');
  toggle.setAttribute('aria-label', `Open sequence ${row.rank}`);
  const short = excerpt(row, scores, wanted);
  const item = el('li', { class: row.weak ? 'row weak' : 'row', tabindex: '-1', 'data-rank': row.rank }, el('div', { class: 'line' }, name, toggle), from, short);
  let whole = null;
  toggle.addEventListener('click', () => {
    const now = toggle.getAttribute('aria-expanded') !== 'true';
    toggle.setAttribute('aria-expanded', String(now));
    toggle.setAttribute('aria-label', `${now ? 'Close' : 'Open'} sequence ${row.rank}`);
    toggle.textContent = now ? 'Close' : 'Open';
    if (now && !whole) short.after((whole = opened(row, scores, run)));
    short.hidden = now;
    if (whole) whole.hidden = !now;
  });
  if (copies && row.copies) {
    const unfold = el('button', { type: 'button', class: 'copies', 'aria-expanded': 'false' }, `${plural(row.copies.length, 'row')} folded: rank ${row.copies.map(([rank]) => rank).join(', ')}`);
    unfold.addEventListener('click', () => copies(row, item, unfold));
    from.append(unfold);
  }
  item.tell = (index) => tokenSentence(row, scores, index);
  return item;
}
