/* A digit reader that runs in the page: a packed keras_mml network in plain JavaScript, without dependencies.
 *
 * 1. The network   the weights as trits, and sums that only add and subtract
 * 2. The kernels   the same network in the library's C, as WebAssembly, with the same logits
 * 3. The drawing   from strokes to 28 x 28 pixels, in the way that MNIST was made
 * 4. The page      a pad to draw on, ten probabilities, and the weights that voted
 *
 * It fills every element of the class digit-demo. The weights come from the notebook tutorials/mnist.ipynb, either as
 * JSON in a script element of the class digit-weights beside that element, or as window.kerasMmlDigitWeights. The kernels,
 * which a page can do without, are window.kerasMmlKernels: a WebAssembly module in base64, see the notebook native/wasm.ipynb.
 * For tests: kerasMmlDemo.load(weights).predict(new Float32Array(784)).
 */
(() => {
"use strict";

// ── 1. The network ──────────────────────────────────────────────────────────────────────────────────────────────────

const { fround } = Math; // to float32: everything below rounds where the kernels in Python round

/** The product of a row of integers with the ternary weights of one unit: additions and subtractions. */
function ternarySum(integers, { added, subtracted }) {
  let sum = 0;
  for (let i = 0; i < added.length; i++) sum += integers[added[i]];
  for (let i = 0; i < subtracted.length; i++) sum -= integers[subtracted[i]];
  return sum;
}

/** The same weights from the other side: what each input is worth, when each unit is worth something. */
function ternarySumsBack(worth, { inputs, voters }) {
  const sums = new Int32Array(inputs);
  voters.forEach(({ added, subtracted }, unit) => {
    for (const input of added) sums[input] += worth[unit];
    for (const input of subtracted) sums[input] -= worth[unit];
  });
  return sums;
}

/** To the nearest integer, from the middle between two of them to the even one. */
function roundHalfToEven(value) {
  const rounded = Math.round(value); // upwards from the middle
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** The sum of the squares of a row, added in the order of the kernels, since another order would round differently. */
function sumOfSquares(row) {
  const squares = new Float64Array(16);
  row.forEach((value, i) => (squares[i % 16] += value * value));
  for (let half = 8; half >= 1; half /= 2) {
    for (let i = 0; i < half; i++) squares[i] += squares[i + half];
  }
  return squares[0];
}

/** Divide a row by its root mean square, and round it to integers in [-127, 127] and a scale. */
function quantize(row, { normEpsilon, scaleEpsilon, limit }) {
  const meanSquare = fround(fround(sumOfSquares(row) / row.length) + fround(normEpsilon));
  const perRms = fround(1 / fround(Math.sqrt(meanSquare)));
  const normalized = row.map((value) => value * perRms); // a Float32Array rounds what it takes
  let largest = fround(scaleEpsilon);
  for (const value of normalized) largest = Math.max(largest, Math.abs(value));
  const perUnit = fround(limit / largest);
  const integers = new Int8Array(normalized.map((value) => roundHalfToEven(fround(value * perUnit))));
  return { integers, scale: fround(largest / limit) };
}

/** One layer: integers, their sums, and back to floats with one scale and a bias for each unit. */
function layerOutputs(layer, row, settings) {
  const { integers, scale } = quantize(row, settings);
  const sums = layer.voters.map((voter) => ternarySum(integers, voter));
  const sumScale = fround(scale * layer.scale);
  const outputs = Float32Array.from(sums, (sum, unit) => fround(sum * sumScale) + layer.bias[unit]);
  if (layer.activation === "relu") outputs.forEach((value, unit) => (outputs[unit] = Math.max(value, 0)));
  return { integers, sums, outputs };
}

function softmax(values) {
  const largest = Math.max(...values);
  const powers = Array.from(values, (value) => Math.exp(value - largest));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / total);
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));

/** Five trits are a byte, the first of them its last digit in base 3. */
function unpackTrits(bytes, count) {
  const trits = new Int8Array(count);
  let next = 0;
  for (let code of bytes) {
    for (let digit = 0; digit < 5 && next < count; digit++) {
      trits[next++] = (code % 3) - 1;
      code = Math.floor(code / 3);
    }
  }
  return trits;
}

/** Of the trits of a unit, only where they are 1 and where they are -1. */
function votersOf(trits, inputs, units) {
  const where = (unit, trit) => Uint16Array.from(allInputs.filter((input) => trits[input * units + unit] === trit));
  const allInputs = Array.from({ length: inputs }, (_, input) => input);
  return Array.from({ length: units }, (_, unit) => ({ added: where(unit, 1), subtracted: where(unit, -1) }));
}

/** The part of an image with ink in it, back in its 28 x 28 pixels. */
function unpackImage({ left, top, width, pixels }, side) {
  const image = new Float32Array(side * side);
  bytesOf(pixels).forEach((byte, i) => (image[(top + Math.floor(i / width)) * side + left + (i % width)] = byte / 255));
  return image;
}

/** Make a network of the weights that the notebook wrote. */
function load(weights) {
  const { settings } = weights;
  const layers = weights.layers.map((layer) => {
    const trits = unpackTrits(bytesOf(layer.trits), layer.inputs * layer.units);
    const bias = new Float32Array(bytesOf(layer.bias).buffer);
    return { ...layer, trits, bias, voters: votersOf(trits, layer.inputs, layer.units) };
  });
  const total = (size) => layers.reduce((sum, layer) => sum + size(layer), 0);
  const count = (trit) => total((layer) => layer.trits.reduce((n, t) => n + (t === trit), 0));

  const kernels = compiledNetwork(layers, settings);

  /** What every layer does with 784 pixels from 0 to 1. */
  function stepsOf(image) {
    const steps = [];
    for (const layer of layers) {
      const row = steps.length ? steps[steps.length - 1].outputs : image;
      steps.push(layerOutputs(layer, row, settings));
    }
    return steps;
  }

  /** The ten probabilities for an image, and, for who asks, what every layer did on the way. */
  function predict(image) {
    const pixels = image.slice(); // as they are now
    let steps = null;
    const inJavaScript = () => (steps = steps || stepsOf(pixels));
    const logits = (kernels && kernels(pixels)) || inJavaScript()[layers.length - 1].outputs;
    return { probabilities: softmax(logits), logits, get steps() { return inJavaScript(); } };
  }

  /** How loudly each unit of the first layer spoke for a digit, along all ways through units that were on. */
  function influence(steps, digit) {
    let worth = Int32Array.from({ length: layers[layers.length - 1].units }, (_, unit) => (unit === digit ? 1 : 0));
    for (let i = layers.length - 1; i > 0; i--) {
      const loudness = steps[i].integers; // of the units before this layer; 0 is off
      const sums = ternarySumsBack(worth, layers[i]);
      worth = i > 1 ? sums.map((sum, unit) => (loudness[unit] ? sum : 0)) : sums.map((sum, unit) => sum * loudness[unit]);
    }
    return worth;
  }

  return {
    layers, predict, influence,
    engine: kernels ? "WebAssembly" : "JavaScript",
    samples: weights.samples.map((sample) => ({ label: sample.label, image: unpackImage(sample, settings.side) })),
    additions: count(1), subtractions: count(-1), leftOut: count(0),
    saved: total((layer) => layer.trits.length),
    // squares, dividing by the root of their mean, and rounding of each input; scaling of each output
    remaining: total((layer) => 3 * layer.inputs + layer.units),
  };
}

// ── 2. The kernels ──────────────────────────────────────────────────────────────────────────────────────────────────

/** The trits of a layer as the kernels read them: 2 bits each, in blocks of 64 units and 16 inputs (see packing.ipynb). */
function packTrits({ trits, inputs, units }) {
  const blocks = Math.ceil(inputs / 16);
  const packed = new Uint8Array(Math.ceil(units / 64) * blocks * 256).fill(0b01010101); // four zeros: a trit t is t + 1
  for (let input = 0; input < inputs; input++) {
    for (let unit = 0; unit < units; unit++) {
      const block = Math.floor(unit / 64) * blocks + Math.floor(input / 16);
      const byte = 256 * block + 4 * (unit % 64) + (input % 4), group = Math.floor((input % 16) / 4);
      packed[byte] += trits[input * units + unit] * 4 ** group;
    }
  }
  return packed;
}

/** A function from pixels to logits in the kernels; null where the page has none, or the browser cannot run them. */
function compiledNetwork(layers, settings) {
  if (!window.kerasMmlKernels) return null;
  try {
    const module = new WebAssembly.Module(bytesOf(window.kerasMmlKernels));
    return networkIn(new WebAssembly.Instance(module).exports, layers, settings);
  } catch (error) {
    return null;
  }
}

/** Copy a network into the memory of the kernels, where addresses are positions. */
function networkIn({ memory, malloc, keras_mml_run: run, _initialize: initialize }, layers, { limit }) {
  initialize();
  const reserve = (bytes) => {
    const address = malloc(bytes);
    if (!address) throw new Error("There is no memory for the network.");
    return address;
  };
  const put = (array) => {
    const address = reserve(array.byteLength);
    new Uint8Array(memory.buffer).set(new Uint8Array(array.buffer), address);
    return address;
  };

  const LAYER = 56; // bytes of `struct layer` in native.h: three numbers of 64 bits, four addresses of 32, two numbers
  const table = new DataView(new ArrayBuffer(LAYER * layers.length));
  layers.forEach((layer, i) => {
    const numbers = (from, values) => values.forEach((value, k) => table.setBigInt64(LAYER * i + from + 8 * k, BigInt(value), true));
    const scale = new Float32Array(layer.units).fill(layer.scale);
    numbers(0, [layer.activation === "relu" ? 1 : 0, layer.inputs, layer.units]); // 0: the last layer ends with its logits
    [packTrits(layer), scale, layer.bias].forEach((array, k) => table.setUint32(LAYER * i + 24 + 4 * k, put(array), true));
    numbers(40, [1, limit]); // normalised
  });

  const first = layers[0], last = layers[layers.length - 1], count = BigInt(layers.length);
  const steps = put(table), inputs = reserve(4 * first.inputs), outputs = reserve(4 * last.units);
  return (image) => {
    new Float32Array(memory.buffer, inputs, first.inputs).set(image); // a new view each time: memory that grows is another buffer
    const done = run(steps, count, inputs, 1n, outputs); // 0 if there is no memory to work in
    return done ? new Float32Array(memory.buffer, outputs, last.units).slice() : null;
  };
}

// ── 3. The drawing ──────────────────────────────────────────────────────────────────────────────────────────────────

const SIDE = 28; // pixels of an image, and the unit in which strokes are kept: the pad is 28 wide
const BOX = 20;  // the digit's longer side
const CENTRE = 14; // where its centre of mass belongs
const PEN = 2.5; // the width at which drawings have as much ink as MNIST has

/** Call `visit` with both ends of every piece of every stroke; a dot is a piece without length. */
function eachPiece(strokes, visit) {
  for (const stroke of strokes) stroke.forEach((point, i) => visit(stroke[Math.max(i - 1, 0)], point));
}

function distanceToPiece(x, y, from, to) {
  const dx = to.x - from.x, dy = to.y - from.y, square = dx * dx + dy * dy;
  const along = square ? Math.min(1, Math.max(0, ((x - from.x) * dx + (y - from.y) * dy) / square)) : 0;
  return Math.hypot(x - from.x - along * dx, y - from.y - along * dy);
}

/** Draw strokes into 28 x 28 pixels with a round pen, whose edge is grey where it covers a part of a pixel. */
function rasterize(strokes) {
  const image = new Float32Array(SIDE * SIDE), reach = PEN / 2 + 0.5;
  const within = (value) => Math.min(SIDE - 1, Math.max(0, value));
  eachPiece(strokes, (from, to) => {
    const [left, right] = [Math.min(from.x, to.x) - reach - 1, Math.max(from.x, to.x) + reach].map(Math.ceil).map(within);
    const [top, bottom] = [Math.min(from.y, to.y) - reach - 1, Math.max(from.y, to.y) + reach].map(Math.ceil).map(within);
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const ink = Math.min(1, reach - distanceToPiece(x + 0.5, y + 0.5, from, to)); // pixels have their middle at a half
        if (ink > image[y * SIDE + x]) image[y * SIDE + x] = ink;
      }
    }
  });
  return image;
}

/** As MNIST was made: the digit's longer side fills 20 pixels, and its centre of mass is in the middle of 28. */
function prepare(strokes) {
  const points = strokes.flat();
  if (!points.length) return new Float32Array(SIDE * SIDE);
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [left, right] = range(points.map((point) => point.x)), [top, bottom] = range(points.map((point) => point.y));
  const scale = (BOX - PEN) / Math.max(right - left, bottom - top, 3); // a dot stays a dot
  const move = (shiftX, shiftY) => strokes.map((stroke) => stroke.map((point) => ({
    x: (point.x - (left + right) / 2) * scale + CENTRE + shiftX,
    y: (point.y - (top + bottom) / 2) * scale + CENTRE + shiftY,
  })));
  const centred = rasterize(move(0, 0));
  let mass = 0, massX = 0, massY = 0;
  centred.forEach((ink, i) => {
    mass += ink;
    massX += ink * (i % SIDE);
    massY += ink * Math.floor(i / SIDE);
  });
  return rasterize(move(Math.round(CENTRE - massX / mass), Math.round(CENTRE - massY / mass)));
}

// ── 4. The page ─────────────────────────────────────────────────────────────────────────────────────────────────────

const ADDED = [43, 127, 200], SUBTRACTED = [222, 74, 70]; // visible on white and on black
const colour = (rgb, alpha) => `rgb(${rgb.join(" ")} / ${alpha})`;
const percent = (share) => (share > 0.999 ? "> 99.9%" : `${(100 * share).toFixed(share > 0.99 || share < 0.0995 ? 1 : 0)}%`);
const spoken = (share) => percent(share).replace("> ", "more than ").replace("%", " percent");
const whole = (number) => number.toLocaleString("en").replace("-", "−");

const PARTS = `
  <div class="dd-stage">
    <div class="dd-paper">
      <canvas class="dd-pad" role="img" aria-label="A pad to draw a digit on, with mouse, pen or finger"></canvas>
      <p class="dd-hint" aria-hidden="true"></p>
    </div>
    <div class="dd-answer">
      <div class="dd-result">
        <span class="dd-digit"></span> <span class="dd-sure"></span>
        <figure class="dd-seen"><figcaption>what<br>it sees</figcaption><canvas width="28" height="28" role="img" aria-label="The drawing as the network sees it, 28 by 28 pixels"></canvas></figure>
        <button type="button" class="dd-clear">Clear</button>
      </div>
      <div class="dd-bars" role="group" aria-label="Probabilities. Press a digit to see which weights voted on it."></div>
    </div>
  </div>
  <div class="dd-samples" role="group" aria-label="Digits from the test set"></div>
  <div class="dd-why">
    <figure class="dd-votes">
      <figcaption><b class="dd-title">The last vote</b><p class="dd-vote-text"></p></figcaption>
      <canvas role="img"></canvas>
    </figure>
    <figure class="dd-units">
      <figcaption><b class="dd-title">The first look</b><p class="dd-unit-text"></p></figcaption>
      <div></div>
    </figure>
  </div>
  <p class="dd-count"></p>
  <p class="dd-live" aria-live="polite"></p>`;

const UNITS_SHOWN = 9;

/** Build the demo inside an element. */
function mount(root, network) {
  root.classList.add("dd-ready");
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Digit reader");
  root.innerHTML = PARTS;
  const $ = (selector) => root.querySelector(selector);
  const pad = $(".dd-pad"), ink = pad.getContext("2d");
  let strokes = [], sample = null, picked = null; // picked: the digit whose votes are shown, if it is not the answer
  let image = null, result = null, answers = 0, milliseconds = 0;
  let drawing = null, last = null, scheduled = false, announced = true; // drawing: the pointer that does; last: where it was

  const bars = network.layers[network.layers.length - 1].bias.length;
  for (let digit = 0; digit < bars; digit++) {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<span class="dd-track"><span class="dd-bar"></span><i></i></span><b>${digit}</b>`;
    button.addEventListener("click", () => pick(digit));
    $(".dd-bars").append(button);
  }

  for (const one of network.samples) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `A handwritten ${one.label}`);
    button.append(Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE }));
    button.addEventListener("click", () => show(one));
    $(".dd-samples").append(button);
    one.button = button;
  }

  for (let i = 0; i < UNITS_SHOWN; i++) {
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    canvas.setAttribute("role", "img");
    $(".dd-units > div").append(canvas);
  }

  // -- what happens

  /** Show a sample, or with null an empty pad. */
  function show(one) {
    [strokes, sample, picked, drawing, announced] = [[], one, null, null, false];
    schedule();
  }

  /** Show how the vote on this digit went; asked again, or in the next drawing, how the vote on the answer went. */
  function pick(digit) {
    picked = picked === digit ? null : digit;
    drawAnswer();
    drawPictures();
    $(".dd-live").textContent = `The vote on ${shown()}: ${$(".dd-votes canvas").getAttribute("aria-label")}`;
  }

  function clear() {
    show(null);
    $(".dd-live").textContent = "Cleared.";
  }

  function point(event) {
    const box = pad.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * SIDE, y: ((event.clientY - box.top) / box.height) * SIDE };
  }

  const within = (value) => Math.min(SIDE, Math.max(0, value));
  const isOnPad = ({ x, y }) => x === within(x) && y === within(y);

  /** Where the way from a point on the pad to one beside it meets the border. */
  function border(on, beside) {
    const parts = ["x", "y"].filter((axis) => beside[axis] !== on[axis])
      .map((axis) => (within(beside[axis]) - on[axis]) / (beside[axis] - on[axis]));
    const part = Math.min(...parts);
    return { x: within(on.x + part * (beside.x - on.x)), y: within(on.y + part * (beside.y - on.y)) };
  }

  /** Go on with the stroke; one that leaves the pad ends at the border, and another begins where the pointer returns. */
  function moveTo(next) {
    if (isOnPad(next) && !isOnPad(last)) strokes.push([border(next, last)]);
    const stroke = strokes[strokes.length - 1];
    if (isOnPad(next)) stroke.push(next);
    else if (isOnPad(last)) stroke.push(border(last, next));
    last = next;
  }

  pad.addEventListener("pointerdown", (event) => {
    if (drawing !== null || event.button) return; // a second finger, or another button of the mouse
    event.preventDefault();
    pad.setPointerCapture(event.pointerId);
    [drawing, sample, picked, announced] = [event.pointerId, null, null, false];
    last = point(event);
    strokes.push([last]);
    schedule();
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.pointerId !== drawing) return;
    const events = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    (events.length ? events : [event]).map(point).forEach(moveTo);
    schedule();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    pad.addEventListener(end, (event) => {
      if (event.pointerId !== drawing) return;
      drawing = null;
      schedule();
    });
  }
  $(".dd-clear").addEventListener("click", clear);
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") clear();
  });

  // -- what is seen

  /** Think and draw once in the next frame, however many events come before it. */
  function schedule() {
    if (!scheduled) requestAnimationFrame(update);
    scheduled = true;
  }

  function update() {
    scheduled = false;
    const empty = !sample && !strokes.length;
    const start = performance.now();
    image = sample ? sample.image : prepare(strokes);
    result = empty ? null : network.predict(image);
    milliseconds = performance.now() - start;
    if (result && drawing === null) answers++; // of samples and finished strokes, not of each picture in between
    root.classList.toggle("dd-empty", empty);
    root.classList.toggle("dd-drawn", !empty && !sample);
    drawAnswer();
    drawCount();
    drawPictures();
    announce();
  }

  const inkColour = () => getComputedStyle(root).color;

  function drawPad() {
    const size = Math.round(pad.clientWidth * (window.devicePixelRatio || 1));
    if (pad.width !== size) pad.width = pad.height = size;
    ink.setTransform(size / SIDE, 0, 0, size / SIDE, 0, 0);
    ink.clearRect(0, 0, SIDE, SIDE);
    ink.fillStyle = ink.strokeStyle = inkColour();
    [ink.lineWidth, ink.lineCap, ink.lineJoin] = [PEN, "round", "round"];
    if (sample) {
      const small = document.createElement("canvas");
      small.width = small.height = SIDE;
      drawImage(small, sample.image);
      ink.drawImage(small, 0, 0, SIDE, SIDE);
    }
    for (const stroke of strokes) {
      ink.beginPath();
      eachPiece([stroke], (_, to) => ink.lineTo(to.x, to.y));
      ink.lineTo(stroke[stroke.length - 1].x, stroke[stroke.length - 1].y); // so that a dot is drawn, too
      ink.stroke();
    }
    $(".dd-hint").textContent = sample ? "draw your own over it" : "draw a digit here";
    $(".dd-hint").hidden = strokes.length > 0;
    for (const one of network.samples) one.button.setAttribute("aria-pressed", String(one === sample));
  }

  /** Fill a canvas of 28 x 28 with colours [r, g, b, alpha], one for each pixel. */
  function drawPixels(canvas, colourOf) {
    const context = canvas.getContext("2d"), pixels = context.createImageData(SIDE, SIDE);
    for (let i = 0; i < SIDE * SIDE; i++) {
      const [r, g, b, alpha] = colourOf(i);
      pixels.data.set([r, g, b, 255 * alpha], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
  }

  /** An image in the colour of the text, whatever notation that is in. */
  function drawImage(canvas, image) {
    drawPixels(canvas, (i) => [0, 0, 0, image[i]]);
    const context = canvas.getContext("2d");
    [context.globalCompositeOperation, context.fillStyle] = ["source-in", inkColour()];
    context.fillRect(0, 0, SIDE, SIDE);
  }

  /** The digit whose votes are shown: the picked one, or the answer. */
  const answer = () => (result ? result.probabilities.indexOf(Math.max(...result.probabilities)) : null);
  const shown = () => (picked === null ? answer() : picked);

  function drawAnswer() {
    $(".dd-digit").textContent = result ? answer() : "?";
    $(".dd-sure").textContent = result ? percent(result.probabilities[answer()]) : "";
    [...$(".dd-bars").children].forEach((button, digit) => {
      const share = result ? result.probabilities[digit] : 0;
      button.querySelector(".dd-bar").style.transform = `scaleY(${share})`;
      const label = button.querySelector("i");
      label.textContent = share >= 0.005 && digit !== answer() ? percent(share) : "";
      label.style.bottom = `${100 * share}%`;
      button.classList.toggle("dd-first", digit === answer());
      button.disabled = !result;
      button.setAttribute("aria-pressed", String(digit === shown()));
      button.setAttribute("aria-label", `${digit}: ${spoken(share)}`);
    });
  }

  /** A square for each input of the last layer: as large as it is loud, in the colour of its trit for the digit. */
  function drawVotes() {
    const canvas = $(".dd-votes canvas"), digit = shown(), last = network.layers[network.layers.length - 1];
    const columns = Math.ceil(Math.sqrt(last.inputs)), size = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1));
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    context.setTransform(size / columns, 0, 0, size / columns, 0, 0);
    context.clearRect(0, 0, columns, columns);
    const loudness = result ? result.steps[result.steps.length - 1].integers : new Int32Array(last.inputs);
    let added = 0, subtracted = 0;
    loudness.forEach((value, unit) => {
      const trit = result ? last.trits[unit * last.units + digit] : 0;
      if (trit === 1) added += value;
      if (trit === -1) subtracted += value;
      const side = 0.1 + 0.84 * Math.sqrt(value / 127), gap = (1 - side) / 2; // its area is the loudness
      context.fillStyle = trit ? colour(trit === 1 ? ADDED : SUBTRACTED, value ? 1 : 0.45) : colour([128, 128, 128], value ? 0.16 : 0.25);
      context.fillRect((unit % columns) + gap, Math.floor(unit / columns) + gap, side, side);
    });
    canvas.setAttribute("aria-label", result ? `${whole(added)} added, ${whole(subtracted)} subtracted.` : "Nothing yet.");
    $(".dd-vote-text").innerHTML = result
      ? `The ${last.inputs} units before the end, and what the <b>${digit}</b> makes of them: `
        + `<span class="dd-plus">${whole(added)} added</span> − <span class="dd-minus">${whole(subtracted)} subtracted</span> = <b>${whole(added - subtracted)}</b>. `
        + "Larger squares are louder units, grey ones are left out. Press another digit above to see its vote."
      : "Each square is a unit before the end. An answer adds the blue ones and subtracts the red ones.";
  }

  /** The trits of the units that spoke loudest for the digit, each a picture: strong where there is ink. */
  function drawUnits() {
    const digit = shown(), first = network.layers[0];
    const worth = result ? network.influence(result.steps, digit) : new Int32Array(first.units);
    const loudest = Array.from(worth.keys()).sort((a, b) => worth[b] - worth[a]);
    [...$(".dd-units > div").children].forEach((canvas, i) => {
      drawPixels(canvas, (pixel) => {
        const trit = first.trits[pixel * first.units + loudest[i]], alpha = result ? 0.16 + 0.84 * image[pixel] : 0.1;
        return trit ? [...(trit === 1 ? ADDED : SUBTRACTED), alpha] : [128, 128, 128, 0.25 * image[pixel]];
      });
      canvas.setAttribute("aria-label", result ? `Unit ${loudest[i]} of the first layer: its sum is ${whole(result.steps[0].sums[loudest[i]])}.` : "Nothing yet.");
    });
    $(".dd-unit-text").innerHTML = result
      ? `The ${UNITS_SHOWN} units of the first layer that spoke loudest for the <b>${digit}</b>. Each adds the ink on its `
        + '<span class="dd-plus">blue</span> pixels and subtracts the ink on its <span class="dd-minus">red</span> ones.'
      : "Each picture is a unit of the first layer: it adds the ink on blue pixels and subtracts the ink on red ones.";
  }

  function drawCount() {
    const time = milliseconds < 1 ? "in less than a millisecond" : `in ${milliseconds.toFixed(0)} ms`;
    $(".dd-count").innerHTML =
      `<b>${whole(answers * network.saved)}</b> multiplications saved so far. Each answer makes ${whole(network.additions)} additions `
      + `and ${whole(network.subtractions)} subtractions and leaves ${whole(network.leftOut)} weights out, where float weights take `
      + `${whole(network.saved)} multiplications; ${whole(network.remaining)} remain around the sums, to bring numbers to size.`
      + (result ? ` The last answer was found ${time} with ${network.engine}.` : "");
  }

  /** Say the answer once a stroke has ended, not sixty times a second. */
  function announce() {
    if (announced || drawing !== null || !result) return;
    announced = true;
    $(".dd-live").textContent = `It reads ${answer() === 8 ? "an" : "a"} ${answer()}, with a probability of ${spoken(result.probabilities[answer()])}.`;
  }

  // -- the beginning, and what can change around the demo

  function drawPictures() {
    drawPad();
    drawImage($(".dd-seen canvas"), image);
    drawVotes();
    drawUnits();
  }

  /** Once more, in the colours and the size of the page as it is now. */
  function repaint() {
    for (const one of network.samples) drawImage(one.button.firstChild, one.image);
    drawPictures();
  }

  for (const one of network.samples) network.predict(one.image); // browsers compile what runs more than once
  sample = network.samples[3];
  update();
  new ResizeObserver(repaint).observe(pad); // which calls it at once
  const themes = new MutationObserver(() => requestAnimationFrame(repaint));
  for (const element of [document.documentElement, document.body]) themes.observe(element, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
}

/** Build every demo of the page that has weights and was not built yet. */
function start() {
  for (const element of document.querySelectorAll(".digit-demo:not(.dd-ready)")) {
    const beside = element.parentElement.querySelector("script.digit-weights");
    const weights = beside ? JSON.parse(beside.textContent) : window.kerasMmlDigitWeights;
    if (weights) mount(element, load(weights));
  }
}

window.kerasMmlDemo = { load, prepare, mount, start, ternarySum };
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
})();
