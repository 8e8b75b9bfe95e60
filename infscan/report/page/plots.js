// Small figures, drawn as SVG: every one has a title, and a sentence that says what it shows.

const WIDTH = 320;
const HEIGHT = 150;
// A label's width.
const LABEL = 38;
const EDGE = { left: 44, right: 8, top: 8, bottom: 26 };

function figure(title, says, ...drawn) {
  const picture = svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': `${title}. ${says}` }, ...drawn);
  return el('figure', {}, el('figcaption', {}, title), picture, el('p', { class: 'says' }, says));
}

const textAt = (x, y, text, anchor = 'middle') => svg('text', { x, y, 'text-anchor': anchor, class: 'tick' }, text);
const ruleAt = (x1, y1, x2, y2) => svg('line', { x1, y1, x2, y2, class: 'rule' });
const scale = (from, to, start, stop) => (value) => start + ((value - from) / (to - from || 1)) * (stop - start);
const power = (exponent) => (exponent >= 0 && exponent <= 4 ? (10 ** exponent).toLocaleString('en') : `1e${exponent}`);

// Score by rank, both logarithmic: published rows as dots and, where all scan scores were kept, the whole curve.
function tailPlot(head) {
  const sides = ['proponent', 'opponent'].map((side) => ({
    side,
    dots: head[side].scores.map((score, index) => [Math.log10(index + 1), Math.log10(Math.abs(score))]).filter(([, y]) => Number.isFinite(y)),
    curve: head.histogram ? curve(head.histogram, side === 'proponent' ? 'positive' : 'negative') : [],
  }));
  const points = sides.flatMap(({ dots, curve }) => [...dots, ...curve]);
  if (!points.length) return null;
  const top = Math.max(...points.map(([, y]) => y));
  const low = Math.max(Math.min(...points.map(([, y]) => y)), top - 5);
  const far = Math.max(1, ...points.map(([x]) => x));
  const x = scale(0, far, EDGE.left, WIDTH - EDGE.right);
  const y = scale(low, top, HEIGHT - EDGE.bottom, EDGE.top + 4);
  const drawn = [];
  for (let tick = 0; tick <= far + 0.01; tick += 1) drawn.push(textAt(x(tick), HEIGHT - 10, power(tick)), ruleAt(x(tick), EDGE.top, x(tick), HEIGHT - EDGE.bottom));
  for (let tick = Math.ceil(low); tick <= top; tick += 1) drawn.push(textAt(EDGE.left - 5, y(tick) + 3, power(tick), 'end'), ruleAt(EDGE.left, y(tick), WIDTH - EDGE.right, y(tick)));
  for (const { side, dots, curve } of sides) {
    const seen = curve.filter(([, value]) => value >= low);
    if (seen.length) drawn.push(svg('polyline', { points: seen.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' '), class: `curve ${side}` }));
    for (const [a, b] of dots) if (b >= low) drawn.push(svg('circle', { cx: x(a).toFixed(1), cy: y(b).toFixed(1), r: 2.2, class: side }));
  }
  const first = head.proponent.scores;
  const says = first.length
    ? `Score by rank, both axes logarithmic. The strongest proponent has ${number(first[0])}, number ${first.length} has ${number(first.at(-1))}.`
    : 'Score by rank, both axes logarithmic. No sequence raised it.';
  return figure('The tail', head.histogram ? `${says} Lines: all scan scores.` : says, ...drawn);
}

// From counts by size: (log10 of how many are at least so large, log10 of that size).
function curve(histogram, sign) {
  const points = [];
  let count = 0;
  for (let bin = histogram[sign].length - 1; bin >= 0; bin -= 1) {
    count += histogram[sign][bin];
    if (count) points.push([Math.log10((count * histogram.of) / histogram.parts), histogram.first + bin / histogram.per_decade]);
  }
  return points;
}

// How many sequences have which scan score: negative ones left, positive ones right, sizes logarithmic.
function histogramPlot(head) {
  const histogram = head.histogram;
  if (!histogram) return null;
  const bins = histogram.positive.length;
  const most = Math.max(1, ...histogram.positive, ...histogram.negative);
  const middle = (EDGE.left + WIDTH - EDGE.right) / 2;
  const wide = (WIDTH - EDGE.right - middle - 2) / (bins || 1);
  const y = scale(0, most, HEIGHT - EDGE.bottom, EDGE.top + 4);
  const drawn = [ruleAt(middle, EDGE.top, middle, HEIGHT - EDGE.bottom), textAt(EDGE.left - 5, y(most) + 4, most.toLocaleString('en'), 'end'), textAt(EDGE.left - 5, y(0), '0', 'end')];
  for (let bin = 0; bin < bins; bin += 1) {
    for (const [sign, side, left] of [['positive', 'proponent', middle + 1 + bin * wide], ['negative', 'opponent', middle - 1 - (bin + 1) * wide]]) {
      const count = histogram[sign][bin];
      if (count) drawn.push(svg('rect', { x: left.toFixed(1), y: y(count).toFixed(1), width: Math.max(1, wide - 1).toFixed(1), height: (y(0) - y(count)).toFixed(1), class: side }));
    }
  }
  const last = histogram.first + bins / histogram.per_decade;
  // Decades between two labels, so that they do not touch.
  const every = Math.max(1, Math.ceil(LABEL / (histogram.per_decade * wide)));
  for (let tick = Math.ceil(histogram.first); tick <= last; tick += 1) {
    const away = (tick - histogram.first) * histogram.per_decade * wide;
    if (tick % every === 0 && away >= LABEL / 2) {
      drawn.push(textAt(middle + 1 + away, HEIGHT - 10, `+${power(tick)}`), textAt(middle - 1 - away, HEIGHT - 10, `−${power(tick)}`));
    }
  }
  const [up, down] = [sum(histogram.positive), sum(histogram.negative)];
  const part = histogram.parts < histogram.of ? ` From ${histogram.parts} of ${histogram.of} shards.` : '';
  return figure('All scan scores', `${plural(up, 'sequence')} raised it, ${down.toLocaleString('en')} lowered it; sizes are logarithmic.${part}`, ...drawn);
}

// A score split over layers, in the model's order; they add up to it.
function layerPlot(title, packed, names) {
  const values = numbers(packed);
  const low = Math.min(0, ...values);
  const top = Math.max(0, ...values);
  const y = scale(low, top, HEIGHT - EDGE.bottom, EDGE.top + 4);
  const wide = (WIDTH - EDGE.left - EDGE.right) / values.length;
  const drawn = [textAt(EDGE.left - 5, y(top) + 4, number(top, 2), 'end'), ruleAt(EDGE.left, y(0), WIDTH - EDGE.right, y(0))];
  if (low < 0) drawn.push(textAt(EDGE.left - 5, y(low) + 1, number(low, 2), 'end'));
  values.forEach((value, layer) => {
    const bar = svg('rect', {
      x: (EDGE.left + layer * wide).toFixed(1),
      y: Math.min(y(0), y(value)).toFixed(1),
      width: Math.max(0.5, wide - (wide > 4 ? 2 : 0.3)).toFixed(1),
      height: Math.max(0.5, Math.abs(y(value) - y(0))).toFixed(1),
      class: value < 0 ? 'opponent' : 'proponent',
    });
    bar.append(svg('title', {}, `${line(names[layer])}: ${number(value)}`));
    drawn.push(bar);
  });
  drawn.push(textAt(EDGE.left, HEIGHT - 10, 'first layer', 'start'), textAt(WIDTH - EDGE.right, HEIGHT - 10, 'last', 'end'));
  const largest = values.reduce((best, value, layer) => (Math.abs(value) > Math.abs(values[best]) ? layer : best), 0);
  const size = sum(values.map(Math.abs)) || 1;
  const thirds = [0, 1, 2].map((third) => sum(values.filter((_, layer) => Math.floor((3 * layer) / values.length) === third).map(Math.abs)) / size);
  return figure(title, `Largest: ${line(names[largest])} with ${number(values[largest])}. Of the sizes, the lower third of the layers holds ${percent(thirds[0])}, the middle ${percent(thirds[1])}, the upper ${percent(thirds[2])}.`, ...drawn);
}

// What training on rows and on controls did to the completion: a table, as `infscan prove` found it.
function effectsTable(title, proved) {
  if (!proved) return null;
  const after = plural(proved.steps, 'training step');
  const cells = ([kind, rows, mean, low, high, raises]) => el('tr', {}, el('th', { scope: 'row' }, line(kind)), el('td', {}, rows.toLocaleString('en')), el('td', {}, number(mean, 3)), el('td', {}, `${number(low, 3)} to ${number(high, 3)}`), el('td', {}, percent(raises)));
  const heads = ['trained on', 'rows', 'nats', '95 %', 'raise it'].map((name) => el('th', { scope: 'col' }, name));
  const table = el('table', { class: 'effects' }, el('thead', {}, el('tr', {}, ...heads)), el('tbody', {}, ...proved.kinds.map(cells)));
  return el('figure', {}, el('figcaption', {}, title), table, el('p', { class: 'says' }, `Change of the completion's log-probability after ${after} on one sequence alone, on a copy of the model; the last three kinds are controls.`));
}
