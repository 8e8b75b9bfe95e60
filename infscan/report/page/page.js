// What is looked at (run, query, side), and the controls that change it.

const state = { run: 0, query: 0, side: 'proponent', turn: 0, rows: [], shown: 0, loading: false };
const STEP = 10;

const run = () => INDEX.runs[state.run];
const query = () => run().queries[state.query];
const side = () => query()[state.side];

function fillQueries() {
  const wanted = $('find-query').value.trim().toLowerCase();
  const list = [];
  run().queries.forEach((each, index) => {
    if (wanted && !`${each.id} ${each.prompt} ${each.completion}`.toLowerCase().includes(wanted)) return;
    const button = el('button', { type: 'button', 'data-query': index, 'aria-current': index === state.query ? 'true' : null });
    const measured = { first: 'first token', tokens: 'one token' }[each.measure];
    const asked = el('span', { class: 'asked', dir: 'auto' }, line(each.prompt.slice(-90), 90), ' ', el('strong', {}, line(each.completion.trim(), 60)));
    button.append(asked, el('span', { class: 'id' }, `${each.id}${measured ? ` · ${measured}` : ''}`));
    list.push(el('li', {}, button));
  });
  $('queries').replaceChildren(...list);
  $('query-count').textContent = wanted ? `${list.length} of ${plural(run().queries.length, 'query', 'queries')}` : plural(list.length, 'query', 'queries');
}

function fillRun() {
  const { facts, agreement, warnings } = run();
  $('agreement').textContent = agreement;
  $('warnings').replaceChildren(...warnings.map((warning) => show(el('li'), warning)));
  $('facts').replaceChildren(...facts.flatMap(([name, value]) => [el('dt', {}, name), show(el('dd'), value)]));
}

// The question, its measured tokens marked.
function fillAsked(head) {
  const parts = head.asked.map((part) => {
    const measured = new Set(part.measured);
    const shown = el('p', { class: 'question', dir: 'auto' });
    if (head.asked.length > 1) shown.append(el('span', { class: 'mark' }, part.sign > 0 ? 'for' : 'against'), ' ');
    part.texts.forEach((text, index) => shown.append(measured.has(index) ? show(el('mark'), text, true) : show(el('span'), text, true)));
    if (part.more) shown.append(` … ${plural(part.more, 'character')} more`);
    return shown;
  });
  $('asked').replaceChildren(...parts);
}

async function fillQuery() {
  const turn = (state.turn += 1);
  const { id, measure, agreement, head, known, verdict } = query();
  const what = { completion: 'the log-probability of the marked completion', first: "the log-probability of the completion's first token, marked", tokens: 'the log-probability of one token, marked' }[measure];
  $('query-id').textContent = id;
  $('query-title').textContent = 'What is asked';
  $('query-agreement').textContent = `Measured: ${what}${known ? `; ${known}` : ''}.${agreement ? ` Scan and full-rank scores correlate by ${agreement[0].toFixed(5)} [${agreement[1].toFixed(5)}, ${agreement[2].toFixed(5)}] on a sample.` : ''}`;
  $('verdict').textContent = verdict ? `${verdict[0].toUpperCase()}${verdict.slice(1)}.` : '';
  $('verdict').hidden = !verdict;
  for (const each of ['proponent', 'opponent']) {
    const name = each === 'proponent' ? 'Raised it' : 'Lowered it';
    $(each).textContent = `${name} · ${query()[each].published.toLocaleString('en')}`;
    $(each).setAttribute('aria-pressed', String(state.side === each));
  }
  for (const button of $('queries').querySelectorAll('button')) {
    const current = Number(button.dataset.query) === state.query;
    if (current) button.setAttribute('aria-current', 'true');
    else button.removeAttribute('aria-current');
  }
  const address = `#${new URLSearchParams({ run: run().name, query: id, side: state.side })}`;
  if (location.hash !== address) history.replaceState(null, '', address);
  const found = await chunk(head);
  if (turn !== state.turn) return;
  fillAsked(found);
  const layers = ['proponent', 'opponent'].filter((each) => found[each].layers).map((each) => layerPlot(`Layers, mean of ${each}s`, found[each].layers, run().layers));
  $('plots').replaceChildren(...[tailPlot(found), histogramPlot(found), ...layers, effectsTable('Trained on, for this question', found.proved), effectsTable('Trained on, over all questions', run().proved)].filter(Boolean));
  await fillRows(turn);
}

// Rows that the switches and the search let through, of those decoded.
function passes(row) {
  if ($('hubs').checked && row.hub) return false;
  const wanted = $('find-row').value.trim().toLowerCase();
  if (!wanted) return !($('group').checked && row.alike);
  const { sequence } = row;
  return sequence.texts.join('').toLowerCase().includes(wanted) || sequence.documents.flat().join(' ').toLowerCase().includes(wanted);
}

async function fillRows(turn = (state.turn += 1)) {
  Object.assign(state, { rows: [], shown: 0, next: 0 });
  $('rows').replaceChildren();
  $('rows').classList.toggle('plain', !$('colour').checked);
  await moreRows(turn);
}

async function moreRows(turn = state.turn) {
  if (turn !== state.turn) return;
  const { chunks, shown, published } = side();
  const wanted = $('find-row').value.trim().toLowerCase();
  let added = 0;
  state.loading = true;
  while (state.next < chunks.length && added < STEP) {
    const rows = await chunk(chunks[state.next].chunk);
    if (turn !== state.turn) return;
    state.next += 1;
    state.best ??= 0;
    if (state.next === 1) state.best = Math.abs(rows[0].score);
    const items = rows.filter(passes).map((row) => rowItem(row, run(), state.best, wanted, $('group').checked && !wanted ? unfold : null));
    added += items.length;
    $('rows').append(...items);
  }
  state.loading = false;
  const count = $('rows').querySelectorAll(':scope > li').length;
  const left = chunks.length - state.next;
  const cut = shown < published ? ` The page holds the first ${shown.toLocaleString('en')} of ${published.toLocaleString('en')}; all are in the run's top/.` : '';
  const none = published ? 'None of the sequences passes.' : state.side === 'proponent' ? 'No sequence raised it.' : 'No sequence lowered it.';
  $('row-count').textContent = `${count || left ? `${plural(count, 'sequence')} shown${left ? ', more below' : ''}.` : none}${cut}`;
  $('more-line').hidden = !left;
}

// Puts a row's copies below it, or takes them away.
async function unfold(row, item, button) {
  const open = button.getAttribute('aria-expanded') !== 'true';
  button.setAttribute('aria-expanded', String(open));
  item.querySelector(':scope > ol')?.remove();
  if (!open) return;
  const list = el('ol', { class: 'folded' });
  item.append(list);
  for (const [rank] of row.copies) {
    const place = side().chunks[Math.floor((rank - 1) / STEP)];
    const found = place && (await chunk(place.chunk))[(rank - 1) % STEP];
    list.append(found ? rowItem(found, run(), state.best, '', null) : el('li', { class: 'note' }, `Rank ${rank} is in the run's top/.`));
  }
}

function choose(change) {
  Object.assign(state, change);
  fillQuery();
  $('side').classList.remove('out');
  $('menu').setAttribute('aria-expanded', 'false');
}

function chooseRun(index) {
  const { id } = query();
  state.run = index;
  // The same question in the other run, where it was asked.
  const same = run().queries.findIndex((each) => each.id === id);
  $('run').value = String(index);
  fillRun();
  fillQueries();
  choose({ query: Math.max(0, same) });
}

// The next or previous among the queries that the list shows.
function stepQuery(by) {
  const buttons = [...$('queries').querySelectorAll('button')];
  const at = buttons.findIndex((button) => Number(button.dataset.query) === state.query);
  const to = buttons[Math.max(0, Math.min(buttons.length - 1, at + by))];
  if (!to) return;
  to.scrollIntoView({ block: 'nearest' });
  choose({ query: Number(to.dataset.query) });
}

async function stepRow(by) {
  const items = [...$('rows').querySelectorAll('li.row')];
  const at = items.indexOf(document.activeElement?.closest('li.row'));
  if (at + by >= items.length && !$('more-line').hidden) await moreRows();
  const now = [...$('rows').querySelectorAll('li.row')];
  const to = now[Math.max(0, Math.min(now.length - 1, at + by))];
  to?.focus({ preventScroll: true });
  to?.scrollIntoView({ block: 'nearest' });
}

const THEMES = ['system', 'light', 'dark'];
function nextTheme() {
  const root = document.documentElement;
  const now = THEMES[(THEMES.indexOf(root.dataset.theme ?? 'system') + 1) % THEMES.length];
  root.dataset.theme = now;
  $('theme').textContent = `Theme: ${now}`;
}

const KEYS = {
  j: () => stepRow(1),
  k: () => stepRow(-1),
  e: () => document.activeElement?.closest('li.row')?.querySelector('button.open')?.click(),
  n: () => stepQuery(1),
  p: () => stepQuery(-1),
  o: () => choose({ side: state.side === 'proponent' ? 'opponent' : 'proponent' }),
  '/': () => $('find-row').focus(),
  q: () => {
    $('side').classList.add('out');
    $('find-query').focus();
  },
  t: nextTheme,
  '?': () => $('help').showModal(),
};

document.addEventListener('keydown', (event) => {
  const typing = event.target.matches('input[type=search], select, textarea');
  if (typing && event.key === 'Escape') event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !$('single').checked || $('help').open) return;
  const act = Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
  if (!act) return;
  event.preventDefault();
  act();
});

$('rows').addEventListener('pointerover', (event) => {
  const token = event.target.closest('.t');
  const tip = $('tip');
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = token.closest('li.row').tell(Number(token.dataset.at));
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
});
$('rows').addEventListener('pointerleave', () => ($('tip').hidden = true));
document.addEventListener('scroll', () => ($('tip').hidden = true), { passive: true });

$('queries').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) choose({ query: Number(button.dataset.query) });
});
for (const each of ['proponent', 'opponent']) $(each).addEventListener('click', () => choose({ side: each }));
for (const id of ['group', 'hubs']) $(id).addEventListener('change', () => fillRows());
$('colour').addEventListener('change', () => $('rows').classList.toggle('plain', !$('colour').checked));
$('find-query').addEventListener('input', fillQueries);
let waiting = 0;
$('find-row').addEventListener('input', () => {
  clearTimeout(waiting);
  waiting = setTimeout(fillRows, 150);
});
$('run').addEventListener('change', () => chooseRun(Number($('run').value)));
$('more').addEventListener('click', () => moreRows());
$('theme').addEventListener('click', nextTheme);
$('keys').addEventListener('click', () => $('help').showModal());
$('close-help').addEventListener('click', () => $('help').close());
$('menu').addEventListener('click', () => {
  const out = $('side').classList.toggle('out');
  $('menu').setAttribute('aria-expanded', String(out));
});
new IntersectionObserver((seen) => {
  if (seen.some((each) => each.isIntersecting) && !state.loading && !$('more-line').hidden) moreRows();
}, { rootMargin: '600px' }).observe($('more-line'));

function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const at = INDEX.runs.findIndex((each) => each.name === wanted.get('run'));
  if (at >= 0) state.run = at;
  state.query = Math.max(0, run().queries.findIndex((each) => each.id === wanted.get('query')));
  if (wanted.get('side') === 'opponent') state.side = 'opponent';
}

fromAddress();
$('run').append(...INDEX.runs.map((each, index) => el('option', { value: index }, line(each.name, 100))));
$('run').value = String(state.run);
$('run-field').hidden = INDEX.runs.length < 2;
fillRun();
fillQueries();
fillQuery();
