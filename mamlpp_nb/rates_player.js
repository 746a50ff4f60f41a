// The player of learned rates (chapter 22). `rates_player` in mamlpp_nb.rates puts this file into a page, below a box
// that carries the numbers; nothing else is loaded. Several players may stand on a page: each run takes the boxes
// that no other has taken.
(() => {
// The axes: a scale for each direction, ticks at round numbers, the names that `draw_rates` writes too.
const left = 60, right = 850, top = 40, bottom = 230 // of the axes, in units of the picture
function add(svg, tag, attributes, text) {
  const element = svg.appendChild(document.createElementNS('http://www.w3.org/2000/svg', tag))
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  if (text) element.textContent = text
  return element
}
function scales(chart) {
  const slots = chart.names.length*chart.frames[0].rates[0][0].length // tensors times steps
  return [i => left + (i + .5)*(right - left)/slots,
          rate => bottom - (rate - chart.low)/(chart.high - chart.low)*(bottom - top)]
}
function ticks(low, high) { // three or more, at multiples of 1, 2 or 5
  const third = (high - low)/3, power = 10**Math.floor(Math.log10(third))
  const gap = power*[5, 2, 1].find(f => f*power <= third)
  const first = Math.ceil(low/gap), digits = Math.max(0, -Math.floor(Math.log10(gap)))
  const values = Array.from({length: Math.floor(high/gap) - first + 1}, (_, k) => (first + k)*gap)
  return values.map(value => [value, value.toFixed(digits)])
}
function axes(svg, chart) {
  const [x, y] = scales(chart), n = chart.names.length, steps = chart.frames[0].rates[0][0].length
  const text = (x, y, words, more) => {
    const usual = {'text-anchor': 'middle', fill: 'currentColor', transform: `translate(${x},${y})`}
    return add(svg, 'text', {...usual, ...more}, words)
  }
  const upright = (x, y, words, more) => text(x, y, words, {transform: `translate(${x},${y}) rotate(-90)`, ...more})
  const line = (x1, y1, x2, y2, opacity) =>
    add(svg, 'line', {x1, y1, x2, y2, stroke: 'currentColor', 'stroke-opacity': opacity})
  line(left, top, left, bottom, 1)
  line(left, bottom, right, bottom, 1)
  if (chart.low < 0 && chart.high > 0) line(left, y(0), right, y(0), .5)
  for (const [rate, words] of ticks(chart.low, chart.high)) {
    text(left - 6, y(rate) + 4, words, {'text-anchor': 'end'})
    line(left - 4, y(rate), left, y(rate), 1)
  }
  for (let s = 0; s < steps; s++) {
    text(x(s*n + (n - 1)/2), top - 6, `step ${s + 1}`)
    if (s) line(x(s*n - .5), top, x(s*n - .5), bottom, .2)
    chart.names.forEach((name, t) => upright(x(s*n + t) + 3, bottom + 7, name, {'text-anchor': 'end', 'font-size': 9}))
  }
  upright(14, (top + bottom)/2, 'inner step size α')
  text((left + right)/2, 300, 'layer tensor')
  text((left + right)/2, 14, chart.title)
}

// A frame: for every seed a line within each step, and dots that say what they are.
const colors = [ // matplotlib's
  '#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2', '#7f7f7f', '#bcbd22', '#17becf']
function draw(svg, chart, frame) {
  const [x, y] = scales(chart), n = chart.names.length
  svg.replaceChildren()
  svg.setAttribute('aria-label', `${chart.title}: learned step sizes, epoch ${frame.name}`)
  axes(svg, chart)
  frame.rates.forEach((tensors, seed) => { // rates[seed][tensor][step]
    const color = colors[seed % colors.length], who = `seed ${chart.seeds[seed]}, epoch ${frame.epochs[seed]}`
    tensors[0].forEach((_, s) => {
      const points = tensors.map((rates, t) => `${x(s*n + t)},${y(rates[s])}`)
      add(svg, 'polyline', {fill: 'none', stroke: color, points: points.join(' ')})
      tensors.forEach((rates, t) => {
        const dot = add(svg, 'circle', {cx: x(s*n + t), cy: y(rates[s]), r: 3, fill: color})
        add(dot, 'title', {}, `${who}, step ${s + 1}, ${chart.names[t]}: ${rates[s]}`)
      })
    })
    const middle = left + (right - left)*(seed + .5)/frame.rates.length
    add(svg, 'text', {'text-anchor': 'middle', fill: color, x: middle, y: 320}, who)
  })
}

// What the reader can move.
for (const box of document.querySelectorAll('.rates-player:not([data-ready])')) {
  const charts = JSON.parse(box.dataset.charts)
  const [choice, slider, said, button, svg] =
    ['select', 'input', 'output', 'button', 'svg'].map(tag => box.querySelector(tag))
  let timer = 0
  function show() {
    const chart = charts[choice.value], frame = chart.frames[slider.value]
    said.textContent = frame.name
    draw(svg, chart, frame)
  }
  function stop() {
    clearInterval(timer)
    timer = 0
    button.textContent = 'play'
  }
  function next() {
    slider.stepUp()
    show()
    if (slider.value === slider.max) stop()
  }
  function play() {
    if (slider.value === slider.max) slider.value = 0 // from the start again
    show()
    timer = setInterval(next, 500)
    button.textContent = 'stop'
  }
  function begin() {
    stop()
    slider.max = charts[choice.value].frames.length - 1
    slider.value = 0
    show()
  }
  charts.forEach((chart, i) => choice.add(new Option(chart.title, i)))
  choice.onchange = begin
  slider.oninput = () => { stop(); show() }
  button.onclick = () => timer ? stop() : play()
  box.dataset.ready = 'yes'
  begin()
}
})()
