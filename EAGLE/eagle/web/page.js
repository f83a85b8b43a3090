// The page of `msd web`: one request an answer, its events read line by line.
"use strict";

const DEEPEST = 10; // colours in page.css; deeper tokens share the last
const $ = (id) => document.getElementById(id);
let picture = null; // base64, or null
let running = null; // AbortController of the answer in progress
let limits = null; // of the server, from /about

function problem(text) {
  $("problem").textContent = text;
}

function show(bytes, type) {
  const blob = new Blob([bytes], { type });
  problem("");
  if (limits && blob.size > limits.max_picture) {
    clear();
    const size = (number) => (number / 2 ** 20).toFixed(1);
    problem(`The picture has ${size(blob.size)} MB; the server takes at most ${size(limits.max_picture)} MB.`);
    return;
  }
  const reader = new FileReader();
  reader.onerror = () => problem("The picture cannot be read.");
  reader.onload = () => {
    picture = reader.result.slice(reader.result.indexOf(",") + 1);
    $("picture").src = reader.result;
    $("picture").hidden = $("clear").hidden = false;
    $("hint").hidden = true;
  };
  reader.readAsDataURL(blob);
}

function clear() {
  picture = null;
  problem("");
  $("file").value = "";
  $("picture").hidden = $("clear").hidden = true;
  $("hint").hidden = false;
  choose(null);
}

function choose(button) {
  for (const other of $("samples").children) other.classList.toggle("chosen", other === button);
}

async function pick(sample, button) {
  const response = await fetch(sample.picture);
  if (!response.ok) {
    problem("The sample cannot be read.");
    return;
  }
  show(await response.arrayBuffer(), response.headers.get("content-type"));
  $("question").value = sample.question;
  choose(button);
}

function pane(title) {
  const article = $("pane").content.cloneNode(true).firstElementChild;
  article.querySelector("h2").textContent = title;
  $("answers").append(article);
  return article;
}

function colour(depth) {
  return `d${Math.min(depth, DEEPEST)}`;
}

function add(article, event) {
  for (const [text, depth] of event.pieces) {
    if (!text) continue;
    const span = document.createElement("span");
    span.textContent = text;
    if (depth) {
      span.className = colour(depth);
      span.dataset.depth = depth;
      span.title = `drafted, accepted at depth ${depth}`;
    }
    article.querySelector(".text").append(span);
  }
}

function measure(article, event) {
  article.querySelector(".tau").textContent = event.tau === null ? "–" : event.tau.toFixed(2);
  article.querySelector(".speed").textContent = event.tokens_per_second.toFixed(1);
  article.querySelector(".count").textContent = event.new_tokens;
}

function state(article, text, error = false) {
  const line = article.querySelector(".state");
  line.textContent = text;
  line.classList.toggle("error", error);
  if (error) announce(text);
}

// For screen readers: starts, ends and errors, not each token.
function announce(text) {
  $("announcement").textContent = text;
}

async function* lines(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// Streams one answer into its pane; gives its end event, or null.
async function answer(article, msd) {
  const title = article.querySelector("h2").textContent;
  state(article, "waiting …");
  announce(`${title}: waiting`);
  const response = await fetch("answer", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    signal: running.signal,
    body: JSON.stringify({
      question: $("question").value,
      image: picture,
      msd,
      max_new_tokens: Number($("length").value),
      temperature: Number($("temperature").value),
    }),
  });
  if (!response.ok) {
    const told = await response.json().catch(() => ({ message: `status ${response.status}` }));
    state(article, told.message, true);
    return null;
  }
  for await (const event of lines(response)) {
    if (event.kind === "error") {
      state(article, event.message, true);
      return null;
    }
    if (event.kind === "waiting") {
      state(article, event.ahead ? `waiting: ${event.ahead} ahead of you` : "reading the question …");
      continue;
    }
    measure(article, event);
    if (event.kind === "end") {
      state(article, `done: ${event.new_tokens} tokens in ${event.cycles} cycles, ${event.seconds.toFixed(2)} s`);
      announce(`${title}: done, ${event.new_tokens} tokens`);
      return event;
    }
    state(article, "answering …");
    add(article, event);
  }
  state(article, "the server ended the answer", true);
  return null;
}

async function ask(submit) {
  submit.preventDefault();
  if (running) return;
  problem("");
  const { length } = $("question").value;
  if (limits && length > limits.max_question) {
    problem(`The question has ${length} characters; the server takes at most ${limits.max_question}.`);
    return;
  }
  const mode = document.querySelector("input[name=mode]:checked").value;
  running = new AbortController();
  $("ask").disabled = true;
  $("stop").disabled = false;
  $("answers").replaceChildren();
  $("verdict").textContent = "";
  const wanted = mode === "both" ? [true, false] : [mode === "msd"];
  const panes = wanted.map((msd) => pane(msd ? "MSD" : "plain decoding"));
  panes[0].scrollIntoView({ block: "nearest" }); // on a phone it may be below the form
  let current = panes[0];
  try {
    const ends = [];
    for (const [place, msd] of wanted.entries()) {
      current = panes[place];
      ends.push(await answer(current, msd)); // one after the other: neither slows the other
    }
    if (ends.length === 2 && ends.every(Boolean)) compare(...ends);
  } catch (error) {
    const stopped = error.name === "AbortError";
    state(current, stopped ? "stopped" : `no answer: ${error.message}`, !stopped);
    if (stopped) announce("stopped");
  } finally {
    running = null;
    $("ask").disabled = false;
    $("stop").disabled = true;
  }
}

function compare(msd, plain) {
  const ratio = (msd.tokens_per_second / plain.tokens_per_second).toFixed(2);
  const same = msd.text === plain.text ? "the same answer" : "the answers differ";
  $("verdict").textContent = `MSD ${ratio}x plain decoding, one after the other; ${same}.`;
  announce($("verdict").textContent);
}

async function start() {
  const about = await (await fetch("about")).json();
  limits = about;
  $("about").textContent = [about.base_model, about.msd_model, about.dtype, about.device].filter(Boolean).join(" · ");
  $("length").max = about.longest;
  $("length").value = Math.min($("length").value, about.longest);
  if (!about.draft) {
    $("mode-plain").checked = true;
    $("mode-msd").disabled = $("mode-both").disabled = true;
  }
  for (const sample of about.samples) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.title = sample.question;
    image.src = sample.picture;
    image.alt = sample.question;
    button.append(image);
    button.addEventListener("click", () => pick(sample, button));
    $("samples").append(button);
  }
  for (let depth = 1; depth <= DEEPEST; depth += 1) {
    const swatch = document.createElement("i");
    swatch.className = colour(depth);
    swatch.textContent = depth === DEEPEST ? `${depth}+` : depth;
    $("scale").append(swatch);
  }
  document.body.dataset.ready = "yes";
}

$("file").addEventListener("change", () => {
  if (!$("file").files.length) return;
  choose(null);
  show($("file").files[0], $("file").files[0].type);
});
$("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) {
    choose(null);
    show(file, file.type);
  }
});
$("picture").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = $("picture");
  if (!picture || Math.max(width, height) <= limits.max_side) return;
  clear();
  problem(`The picture has ${width} x ${height} pixels; the server takes at most ${limits.max_side} a side.`);
});
$("clear").addEventListener("click", clear);
$("stop").addEventListener("click", () => running && running.abort());
$("form").addEventListener("submit", ask);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
start().catch((error) => problem(`The server does not answer: ${error.message}`));
