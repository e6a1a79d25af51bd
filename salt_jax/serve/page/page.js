"use strict";
// One WebSocket; frames come as pictures and are shown at the video's own rate.

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const query = (more) => new URLSearchParams({ ...(token ? { token } : {}), ...more }).toString();
const sides = [0, 1].map((i) => ({ canvas: $("canvas" + i), figure: $("figure" + i), buffer: [], last: Promise.resolve() }));
const arrivals = []; // [time, frames] of the first video
let hello = null, socket = null, running = false, paused = false, tries = 0, over = false;
let video = null; // of "started": what is shown
let clock = 0;

function say(message) { if (socket && socket.readyState === 1) socket.send(JSON.stringify(message)); }
function status(text) { $("status").textContent = text; }

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const viewer = sessionStorage.getItem("viewer");
  const path = location.pathname.replace(/[^/]*$/, "");
  socket = new WebSocket(`${scheme}//${location.host}${path}watch?${query(viewer ? { viewer } : {})}`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { tries = 0; };
  socket.onmessage = ({ data }) => typeof data === "string" ? told(JSON.parse(data)) : frames(data);
  socket.onclose = (event) => {
    setRunning(false);
    if (over) return;
    if (event.code === 1008 || event.code === 1013) return status(event.reason || "The server refused this page.");
    tries += 1;
    status("The connection is lost; trying again …");
    setTimeout(connect, Math.min(8000, 500 * 2 ** tries));
  };
}

function told(event) {
  switch (event.type) {
    case "hello": return greet(event);
    case "started": return started(event);
    case "place":
      return status(event.place ? `You wait: place ${event.place}. A turn is at most ${event.turn} s.` : (running ? "Making your video." : "Ready."));
    case "preparing": return status("Its programs are being compiled, the first time for this model and memory …");
    case "prompt":
      $("strange").textContent = event.learnt ? "" : "The text encoder never learnt such a prompt, so the video may be of anything. It knows:";
      return examples(event.learnt ? hello.models[0].examples : event.examples);
    case "finished": setRunning(false); return status(event.reason);
    case "error": return status(event.message);
    case "end": over = true; setRunning(false); return status(event.reason);
  }
}

function greet(event) {
  const first = !hello;
  hello = event;
  sessionStorage.setItem("viewer", event.viewer);
  if (first) {
    for (const i of [0, 1]) settings(i);
    $("prompt").maxLength = event.limits.characters;
    $("prompt").value = event.models[0].examples[0] || "";
    examples(event.models[0].examples);
  }
  if (!video) status("Ready.");
}

function settings(i) {
  const field = $("side" + i);
  field.append($("settings").content.cloneNode(true));
  const part = (name) => field.querySelector(`[data-name=${name}]`);
  const fill = (select, values, chosen) => select.replaceChildren(...values.map((v) => new Option(v, v, v === chosen, v === chosen)));
  const choose = () => {
    const model = hello.models.find((m) => m.name === part("model").value);
    fill(part("steps"), model.steps, model.steps.includes(4) ? 4 : model.steps[0]);
    fill(part("memory"), model.memories);
  };
  fill(part("model"), hello.models.map((m) => m.name));
  part("model").onchange = choose;
  choose();
}

function chosen(i) {
  const side = {};
  for (const part of $("side" + i).querySelectorAll("[data-name]")) side[part.dataset.name] = part.value;
  side.steps = Number(side.steps);
  side.seed = Number(side.seed);
  return side;
}

function examples(prompts) {
  $("examples").replaceChildren(...prompts.slice(0, 8).map((prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.onclick = () => { $("prompt").value = prompt; ask(); };
    return button;
  }));
}

function ask() {
  const prompt = $("prompt").value.trim();
  if (!prompt) return;
  if (running) return say({ type: "prompt", prompt });
  const both = $("compare").checked ? [chosen(0), { ...chosen(1), seed: chosen(0).seed }] : [chosen(0)];
  say({ type: "start", sides: both, prompt });
}

function setRunning(on) {
  running = on;
  $("change").disabled = $("pause").disabled = !on;
  $("start").textContent = on ? "Start again" : "Start";
}

function started(event) {
  video = { script: {}, until: event.videos[0].frame, names: event.videos.map((v) => v.video) };
  event.videos.forEach((v, i) => {
    sides[i].figure.querySelector("figcaption").textContent = `${v.model}, ${v.steps} steps, ${v.memory}, seed ${v.seed}`;
    sides[i].buffer.length = 0;
  });
  sides[1].figure.hidden = event.videos.length < 2;
  for (const [frame, prompt] of Object.entries(event.videos[0].script)) video.script[frame] = prompt;
  arrivals.length = 0;
  paused = false;
  $("pause").setAttribute("aria-pressed", "false");
  $("pause").textContent = "Pause";
  $("timeline").hidden = false;
  const link = (name, kind, text) => { const a = document.createElement("a"); a.href = `video/${name}.${kind}?${query({})}`; a.textContent = text; a.download = `salt.${kind}`; return a; };
  $("downloads").replaceChildren(...video.names.flatMap((name, i) => {
    const which = video.names.length > 1 ? ` ${i + 1}` : "";
    return [link(name, "mp4", `Download video${which}`), " ", link(name, "json", `its record${which}`), " "];
  }));
  setRunning(true);
  timeline();
}

function frames(data) {
  const size = new DataView(data).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
  if (!video || !video.names.includes(head.video)) return; // of a video that is no longer shown
  const side = sides[head.side];
  let at = 4 + size;
  for (const length of head.sizes) {
    const blob = new Blob([new Uint8Array(data, at, length)], { type: "image/" + head.format });
    const bitmap = createImageBitmap(blob);
    side.last = side.last.then(async () => side.buffer.push({ bitmap: await bitmap, prompt: head.prompt, video: head.video }));
    at += length;
  }
  if (head.side) return;
  arrivals.push([performance.now(), head.sizes.length]);
  if (arrivals.length > 12) arrivals.shift();
  if (video.until === head.frame || head.until > video.until) video.until = head.until;
  const before = Object.keys(video.script).map(Number).filter((f) => f <= head.frame);
  if (video.script[Math.max(...before)] !== head.prompt) video.script[head.frame] = head.prompt;
  timeline();
}

function seconds(frame) {
  // frames of a Wan video are 4 to a latent one after the first; of Moving Shapes as many
  return frame * hello.models[0].perLatent / hello.models[0].fps;
}

function timeline() {
  const slider = $("moment"), end = slider.value === slider.max;
  slider.max = Math.max(0, video.until - 1);
  if (end) slider.value = slider.max;
  $("when").textContent = seconds(slider.value).toFixed(1) + " s";
  const marks = Object.entries(video.script);
  $("marks").replaceChildren(...marks.map(([frame]) => {
    const mark = document.createElement("i");
    mark.style.left = `${100 * frame / Math.max(1, video.until)}%`;
    return mark;
  }));
  if ($("script").childElementCount !== marks.length) {
    $("script").replaceChildren(...marks.map(([frame, prompt]) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = `from ${seconds(frame).toFixed(1)} s`;
      button.onclick = () => { slider.value = frame; slider.oninput(); };
      item.append(button, ` ${prompt}`);
      return item;
    }));
  }
  if (arrivals.length > 3 && running && !paused) {
    const span = (arrivals.at(-1)[0] - arrivals[0][0]) / 1000;
    const rate = arrivals.slice(1).reduce((sum, [, n]) => sum + n, 0) / span;
    status(`Making your video: ${rate.toFixed(1)} frames per second arrive, it plays at ${hello.models[0].fps}.`);
  }
}

function draw(now) {
  requestAnimationFrame(draw);
  if (!hello || now - clock < 1000 / hello.models[0].fps) return;
  clock = now - clock > 500 ? now : clock + 1000 / hello.models[0].fps;
  for (const side of sides) {
    while (side.buffer.length > 64) side.buffer.shift(); // a tab that was in the background
    const next = side.buffer.shift();
    if (!next) continue;
    const { canvas } = side, { bitmap } = next;
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.classList.toggle("large", bitmap.width > 128);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    canvas.setAttribute("aria-label", `Video of: ${next.prompt}`);
    canvas.dataset.shown = Number(canvas.dataset.shown || 0) + 1;
    canvas.dataset.prompt = next.prompt;
    bitmap.close();
  }
}

function pause() {
  if (!running) return;
  paused = !paused;
  say({ type: "pause", on: paused });
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Go on" : "Pause";
  status(paused ? "Paused." : "Making your video.");
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const again = event.submitter === $("start") && document.activeElement === $("start");
  if (running && again) setRunning(false); // a new video, not another prompt
  ask();
};
$("change").onclick = ask;
$("pause").onclick = pause;
$("compare").onchange = () => { $("side1").hidden = !$("compare").checked; };
$("moment").oninput = () => { $("when").textContent = seconds($("moment").value).toFixed(1) + " s"; };
$("fork").onclick = () => say({ type: "fork", side: 0, frame: Number($("moment").value) });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") pause(); });
connect();
requestAnimationFrame(draw);
