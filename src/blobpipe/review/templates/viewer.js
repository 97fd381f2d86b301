// The picture of an image: zoom, values under the pointer, planes, stretch, blinking, and places of missed blobs.
// Without this script the picture stays as the page has it, and a missed blob's place is typed.
"use strict";

const MISSING = -(2 ** 15); // as blobpipe.monitor.thumbnails packs a pixel without a value
const SHIFT = 128;
const HEADER = 12; // bytes
const LARGEST_ZOOM = 64;
const BLINK_MS = 700; // less than three flashes a second
const STRETCHES = { "2": "±2 σ", "4": "±4 σ", "8": "±8 σ", "16": "±16 σ", "64": "±64 σ" };
const SVG = "http://www.w3.org/2000/svg";

function made(name, attributes = {}, ...content) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...content);
  return element;
}

// Values of a plane from its packed bytes, with the median and the noise that its grey scale uses.
function unpacked(buffer) {
  const view = new DataView(buffer);
  const nx = view.getUint32(0, true);
  const ny = view.getUint32(4, true);
  const step = view.getFloat32(8, true);
  const n = nx * ny;
  const low = new Uint8Array(buffer, HEADER, n);
  const high = new Uint8Array(buffer, HEADER + n, n);
  const values = new Float32Array(n);
  for (let k = 0; k < n; k++) {
    const packed = ((high[k] << 24) >> 16) | low[k];
    values[k] = packed === MISSING ? NaN : (packed - SHIFT) * step;
  }
  const sample = values.filter((value, k) => k % 23 === 0 && !Number.isNaN(value)).sort();
  const median = sample[sample.length >> 1] ?? 0;
  const spread = sample.map((value) => Math.abs(value - median)).sort();
  return { nx, ny, values, median, sigma: 1.4826 * (spread[spread.length >> 1] ?? 0) || step };
}

const fetched = new Map();

function plane(address) {
  if (!fetched.has(address)) {
    const answer = fetch(address).then((found) => {
      if (!found.ok) throw new Error(found.statusText);
      return found.arrayBuffer();
    });
    fetched.set(address, answer.then(unpacked));
  }
  return fetched.get(address);
}

function start(figure) {
  const frame = JSON.parse(figure.dataset.view);
  const svg = figure.querySelector("svg");
  const beside = figure.parentElement.querySelector(".beside");
  const names = frame.order;
  const state = {
    plane: names[0], stretch: "4", x: frame.nx >> 1, y: frame.ny >> 1,
    zoom: 1, left: 0, top: 0, before: false, timer: 0, shown: null, pixels: null,
  };
  const form = document.querySelector("details.missed");

  // The stage: a canvas under the marks
  const canvas = made("canvas", { "aria-hidden": "true" });
  const stage = made("div", {
    class: "stage", tabindex: "0", role: "application", "aria-describedby": "viewer-keys",
    "aria-label": `Picture of ${frame.name}: arrows move the pointer by a pixel`,
  });
  svg.replaceWith(stage);
  stage.append(canvas, svg);
  svg.classList.add("live");
  const picture = svg.querySelector("image");
  const cursor = document.createElementNS(SVG, "g");
  cursor.setAttribute("class", "cursor");
  cursor.innerHTML = "<rect width='1' height='1'/><path/>";
  svg.append(cursor);

  // Buttons
  const tools = made("div", { class: "tools", role: "toolbar", "aria-label": "Picture" });
  const button = (text, key, work, pressed) => {
    const made_ = made("button", { type: "button" }, text, " ", made("kbd", {}, key));
    if (pressed !== undefined) made_.setAttribute("aria-pressed", String(pressed));
    made_.addEventListener("click", work);
    tools.append(made_);
    return made_;
  };
  const planeButtons = Object.fromEntries(names.map((name) => [
    name, button(frame.planes[name].name, frame.planes[name].key, () => choose(name), name === state.plane),
  ]));
  const blink = frame.before && Object.keys(frame.before.planes).length
    ? button("Blink", "b", () => toggleBlink(), false) : null;
  const marks = button("Marks", "h", () => toggleMarks(), true);
  button("Zoom in", "+", () => zoomBy(2));
  button("Zoom out", "−", () => zoomBy(0.5));
  button("Whole", "0", () => fit());
  const stretch = made("select", {}, ...Object.entries(STRETCHES).map(([value, text]) => made("option", { value }, text)));
  stretch.value = state.stretch;
  stretch.addEventListener("change", () => { state.stretch = stretch.value; paint(); });
  const label = made("label", {}, "Stretch ", made("kbd", {}, "["), " ", made("kbd", {}, "]"), stretch);
  if (names.length) { stage.before(tools); tools.append(label); }

  // What is under the pointer, beside the picture
  const list = made("dl");
  const output = made("div", { class: "readout", role: "status", "aria-live": "off" }, list);
  beside.prepend(output, made("p", { class: "quiet keys", id: "viewer-keys" },
    "Drag or pinch to move and zoom, wheel to zoom. With the picture in focus: arrows move the pointer by a pixel, with Shift by ten; " +
    "the keys on the buttons."));

  const lines = {};
  for (const name of ["Shown", "Pixel, 0-based", ...(frame.flt === null ? ["Pixel, 1-based"] : ["FLT, 1-based"]), "Value", "Zoom"]) {
    lines[name] = made("dd");
    list.append(made("div", {}, made("dt", {}, name), lines[name]));
  }

  function value() {
    const found = state.pixels;
    if (!found) return names.length ? "loading" : "not kept: the log keeps the pixels of the newest images only";
    const cell = Math.max(1, Math.round(frame.nx / found.nx));
    const column = Math.min(Math.floor(state.x / cell), found.nx - 1);
    const row = Math.min(Math.floor(state.y / cell), found.ny - 1);
    const here = found.values[row * found.nx + column];
    if (Number.isNaN(here)) return "no value";
    if (state.plane === "map") return `probability ${here.toFixed(2)}`;
    const sigmas = (here - found.median) / found.sigma;
    return `${number(100 * here, 2)} % of the light lost, ${number(sigmas, 1)}\u00a0σ`;
  }

  function number(of, digits) {
    return of.toFixed(digits).replace("-", "−");
  }

  function read() {
    const name = frame.planes[state.plane]?.name ?? "Difference";
    lines.Shown.textContent = `${name} of ${state.before ? `${frame.before.name}, the image before` : frame.name}`;
    lines["Pixel, 0-based"].textContent = `x ${state.x}, y ${state.y}`;
    if (frame.flt === null) lines["Pixel, 1-based"].textContent = `x ${state.x + 1}, y ${state.y + 1}`;
    else lines["FLT, 1-based"].textContent = `x ${state.x + frame.flt}, y ${state.y + frame.flt} (DS9, ${frame.nx - 2 * (1 - frame.flt)} frame)`;
    lines.Value.textContent = value();
    lines.Zoom.textContent = `${number(state.zoom, state.zoom < 10 ? 1 : 0)}×`;
  }

  // ------------------------------------------------------------------ drawing

  const off = made("canvas");

  // Grey values of the plane, y upwards
  function paint() {
    const found = state.pixels;
    if (!found) return;
    off.width = found.nx;
    off.height = found.ny;
    const context = off.getContext("2d");
    const grey = context.createImageData(found.nx, found.ny);
    const words = new Uint32Array(grey.data.buffer);
    const limit = state.stretch * found.sigma;
    const [low, high] = state.plane === "map" ? [0, 1] : [found.median - limit, found.median + limit];
    const factor = 255 / (high - low);
    for (let row = 0; row < found.ny; row++) {
      const target = (found.ny - 1 - row) * found.nx;
      for (let k = 0; k < found.nx; k++) {
        const here = found.values[row * found.nx + k];
        const level = Number.isNaN(here) ? 128 : Math.min(255, Math.max(0, (here - low) * factor));
        words[target + k] = 0xff000000 | (Math.round(level) * 0x010101);
      }
    }
    context.putImageData(grey, 0, 0);
    picture?.setAttribute("visibility", "hidden");
    draw();
  }

  function draw() {
    const width = frame.nx / state.zoom;
    const height = frame.ny / state.zoom;
    state.left = Math.min(Math.max(state.left, 0), frame.nx - width);
    state.top = Math.min(Math.max(state.top, 0), frame.ny - height);
    svg.setAttribute("viewBox", `${state.left} ${state.top} ${width} ${height}`);
    const px = width / (stage.clientWidth || frame.nx); // pixels of the image in one of the page
    svg.style.setProperty("--px", px);
    cursor.querySelector("rect").setAttribute("transform", `translate(${state.x} ${frame.ny - 1 - state.y})`);
    const x = state.x + 0.5;
    const y = frame.ny - 0.5 - state.y;
    const near = 6 * px + 0.5;
    const far = near + 12 * px;
    cursor.querySelector("path").setAttribute("d",
      `M${x - far} ${y}H${x - near}M${x + near} ${y}H${x + far}M${x} ${y - far}V${y - near}M${x} ${y + near}V${y + far}`);
    stage.classList.toggle("zoomed", state.zoom > 1);

    if (state.pixels) {
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.round(stage.clientWidth * ratio);
      canvas.height = Math.round(stage.clientHeight * ratio);
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = canvas.width < width;
      const cell = state.pixels.nx / frame.nx;
      context.drawImage(off, state.left * cell, state.top * cell, width * cell, height * cell, 0, 0, canvas.width, canvas.height);
    }
    read();
  }

  // ------------------------------------------------------------------ what is shown

  let wanted = "";

  function load() {
    const addresses = state.before ? frame.before.planes : { [state.plane]: frame.planes[state.plane]?.address };
    const address = addresses[state.plane];
    if (!address) return draw();
    wanted = address;
    plane(address).then((found) => {
      if (wanted !== address) return;
      state.pixels = found;
      paint();
    }).catch((error) => {
      fetched.delete(address);
      lines.Value.textContent = `not available (${error.message})`;
    });
  }

  function choose(name) {
    if (!frame.planes[name]) return;
    if (state.before && !frame.before.planes[name]) toggleBlink(false);
    state.plane = name;
    for (const [other, each] of Object.entries(planeButtons)) each.setAttribute("aria-pressed", String(other === name));
    load();
  }

  function flip() {
    state.before = !state.before && Boolean(frame.before.planes[state.plane]);
    load();
  }

  function toggleBlink(on = blink?.getAttribute("aria-pressed") !== "true") {
    if (!blink) return;
    clearInterval(state.timer);
    state.timer = 0;
    blink.setAttribute("aria-pressed", String(on));
    if (!on) {
      state.before = false;
      load();
      return;
    }
    flip();
    // who wants no motion switches by hand
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) state.timer = setInterval(flip, BLINK_MS);
  }

  function toggleMarks() {
    const hidden = svg.classList.toggle("unmarked");
    marks.setAttribute("aria-pressed", String(!hidden));
  }

  function stretchBy(step) {
    const values = Object.keys(STRETCHES).sort((a, b) => a - b);
    state.stretch = values[Math.min(Math.max(values.indexOf(state.stretch) + step, 0), values.length - 1)];
    stretch.value = state.stretch;
    paint();
  }

  // ------------------------------------------------------------------ moving about

  function zoomBy(factor, x = state.x + 0.5, y = frame.ny - 0.5 - state.y) {
    const zoom = Math.min(Math.max(state.zoom * factor, 1), LARGEST_ZOOM);
    state.left = x - ((x - state.left) * state.zoom) / zoom;
    state.top = y - ((y - state.top) * state.zoom) / zoom;
    state.zoom = zoom;
    draw();
  }

  function fit() {
    state.zoom = 1;
    draw();
  }

  function place(event) {
    const box = stage.getBoundingClientRect();
    return {
      x: state.left + ((event.clientX - box.left) / box.width) * (frame.nx / state.zoom),
      y: state.top + ((event.clientY - box.top) / box.height) * (frame.ny / state.zoom),
    };
  }

  function point(at) {
    state.x = Math.min(Math.max(Math.floor(at.x), 0), frame.nx - 1);
    state.y = Math.min(Math.max(Math.floor(frame.ny - at.y), 0), frame.ny - 1);
    draw();
  }

  function move(dx, dy) {
    state.x = Math.min(Math.max(state.x + dx, 0), frame.nx - 1);
    state.y = Math.min(Math.max(state.y + dy, 0), frame.ny - 1);
    // the pointer stays in sight
    const width = frame.nx / state.zoom;
    const height = frame.ny / state.zoom;
    const top = frame.ny - 1 - state.y;
    state.left = Math.min(Math.max(state.left, state.x + 1 - width), state.x);
    state.top = Math.min(Math.max(state.top, top + 1 - height), top);
    output.setAttribute("aria-live", "polite");
    draw();
  }

  // The place of a missed blob: that of a click, or the pixel under the pointer
  function fill(x, y) {
    if (!form?.open) return;
    form.querySelector("[name=x_px]").value = x.toFixed(1);
    form.querySelector("[name=y_px]").value = y.toFixed(1);
  }

  const pointers = new Map();
  let dragged = 0;

  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    dragged = 0;
  });

  stage.addEventListener("pointermove", (event) => {
    output.setAttribute("aria-live", "off");
    const before = pointers.get(event.pointerId);
    if (!before) return point(place(event));
    const others = [...pointers.values()].filter((other) => other.pointerId !== event.pointerId);
    dragged += Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY);
    const from = place(before);
    const to = place(event);
    if (others.length) {
      // two fingers: the distance between them zooms, at the one that stays
      const apart = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
      const pivot = place(others[0]);
      zoomBy(apart(event, others[0]) / apart(before, others[0]), pivot.x, pivot.y);
    } else if (dragged > 4) {
      state.left -= to.x - from.x;
      state.top -= to.y - from.y;
      draw();
    }
    pointers.set(event.pointerId, event);
  });

  const lift = (event) => {
    if (!pointers.delete(event.pointerId) || event.type === "pointercancel" || dragged > 4) return;
    const at = place(event);
    point(at);
    fill(at.x - 0.5, frame.ny - 0.5 - at.y);
  };
  stage.addEventListener("pointerup", lift);
  stage.addEventListener("pointercancel", lift);

  stage.addEventListener("wheel", (event) => {
    const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002));
    // at the whole picture the page scrolls on
    if (event.ctrlKey === false && factor < 1 && state.zoom === 1) return;
    event.preventDefault();
    const at = place(event);
    zoomBy(factor, at.x, at.y);
  }, { passive: false });

  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const by = event.shiftKey ? 10 : 1;
    const work = {
      ArrowLeft: () => move(-by, 0), ArrowRight: () => move(by, 0), ArrowUp: () => move(0, by), ArrowDown: () => move(0, -by),
      "+": () => zoomBy(2), "=": () => zoomBy(2), "-": () => zoomBy(0.5), "0": () => fit(),
      b: () => toggleBlink(), h: () => toggleMarks(), "[": () => stretchBy(-1), "]": () => stretchBy(1),
      a: () => add(), Enter: () => fill(state.x, state.y),
      ...Object.fromEntries(names.map((name) => [frame.planes[name].key, () => choose(name)])),
    }[event.key];
    if (!work) return;
    event.preventDefault();
    event.stopPropagation();
    work();
  });

  function add() {
    if (!form) return;
    form.open = true;
    fill(state.x, state.y);
  }

  form?.addEventListener("toggle", () => {
    stage.classList.toggle("adding", form.open);
    if (form.open && !form.querySelector("[name=x_px]").value) fill(state.x, state.y);
  });

  new ResizeObserver(draw).observe(stage);
  draw();
  if (names.length) load();
}

for (const figure of document.querySelectorAll("[data-view]")) start(figure);
