"""Look into a run: the solutions of an iteration, with each step's advantage, value and rollouts.

    python tools/show.py runs/demo               # the last stored iteration, in runs/demo/show.html
    python tools/show.py runs/demo --iteration 20 --out page.html
    python tools/show.py runs/demo --text [N]    # prints solution N (default 0)
    python tools/show.py runs/demo --picture credit.png       # the largest drop, as in README

It shows what train.py stores in RUN/episodes every --store_every iterations (run_folder.solution). PPO's values
come from its value network; GRPO and RLOO have no values. Advantages are shown per step for all of them. The
page does not trust the model's text: it sets it as text, never as HTML.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.run_folder import read_solutions

# --- in the terminal ---


def printable(text):
    """A text on one line, without control characters, which a terminal might obey."""
    text = text.strip().replace("\n", " ⏎ ")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def number(value):
    return "   . " if value is None else f"{value:5.2f}"


def as_text(solution):
    """The steps of one solution in a table: value before and after, advantage, text.

    Where values were averaged the advantage is target - baseline, not after - before, and both are shown.
    """
    steps = solution["steps"]
    averaged = any("target" in step for step in steps)
    head = "step  before  after  " + ("target  baseline  " if averaged else "") + "advantage"
    rows = [printable(solution["prompt"]), "", head]
    afterwards = [step["value"] for step in steps[1:]] + [solution["reward"]]
    for i, (step, after) in enumerate(zip(steps, afterwards)):
        before = step["value"]
        values = f"{number(before)}  {number(None if before is None else after)}"
        if averaged:
            values += f"   {number(step.get('target'))}     {number(step.get('baseline'))}"
        rows.append(f"{i:4}   {values}      {step['advantage']:+.2f}  {printable(step['text'])}")
    ended = "" if solution["finished"] else "; unfinished"
    rows.append(f"reward {solution['reward']:g}, the answer is {printable(solution['answer'])}{ended}")
    return "\n".join(rows)


# --- as a page ---

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title></title>
<style>
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1b; --soft: #666; --line: #ccc;
  --card: #f7f7f7; --up: 0 114 178; --down: 213 94 0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #e8e8e8; --soft: #a5a5a5; --line: #444; --card: #1f2227;
  --up: 86 180 233; --down: 240 130 50; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0 0 .5rem; }
.bar { position: sticky; top: 0; background: var(--page); border-bottom: 1px solid var(--line);
  padding: .5rem 0; z-index: 1; display: flex; gap: 1rem; flex-wrap: wrap; align-items: center; }
.legend span { padding: .1rem .4rem; border-radius: .2rem; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .3rem; }
article { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: .7rem 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 12rem; }
.prompt { color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .6rem;
  }
.solution { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  font-size: 14px; line-height: 1.7; }
.step, .value, .prompt, #tip pre { unicode-bidi: isolate; }
.step { border-radius: .2rem; cursor: help; box-shadow: inset 2px 0 var(--line); padding-left: 3px;
  }
.step:hover, .step:focus { outline: 2px solid var(--soft); }
.step.worst { text-decoration: underline wavy rgb(var(--down)); text-underline-offset: 4px; }
.value { font: 11px system-ui; color: var(--soft); margin: 0 .35em; user-select: none; }
#tip { position: fixed; max-width: min(38rem, 90vw); overflow: auto; background: var(--card);
  border: 1px solid var(--soft); box-sizing: border-box; border-radius: .4rem; padding: .6rem .8rem;
  z-index: 2; font-size: 13px; box-shadow: 0 3px 12px rgb(0 0 0 / .3); }
#tip pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; padding-left: .5rem;
  border-left: 3px solid; }
.right { border-color: rgb(var(--up)) !important;
  } .wrong { border-color: rgb(var(--down)) !important; }
</style></head><body>
<h1></h1>
<div class="bar">
 <label>Solutions <select id="which">
  <option value="all">all</option><option value="1">right</option><option value="0">wrong</option>
 </select></label>
 <label>Order <select id="order">
  <option value="drop">largest drop first (lowest advantage)</option>
  <option value="file">as sampled</option>
  <option value="rise">largest rise first</option>
 </select></label>
 <span id="count"></span>
 <span class="legend"><span style="background:rgb(var(--down)/.45)">negative advantage</span>
  <span style="background:rgb(var(--up)/.45)">positive</span>;
  underlined: the lowest of a solution. Hover over a step, or tab to it.</span>
</div>
<main></main><p id="more"></p><div id="tip" hidden></div>
<script id="data" type="application/json">DATA</script>
<script>
"use strict";
const {title, solutions} = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), main = document.querySelector("main"), tip = $("tip");
document.title = title; document.querySelector("h1").textContent = title;
function make(tag, cls, text) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
}
const fixed = x => x === null ? "?" : x.toFixed(2);
const verdict = reward => reward ? "\u2713 right" : "\u2717 wrong";
const signed = x => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);
const lowest = s => s.steps.reduce((m, t) => Math.min(m, t.advantage), 0);
const highest = s => s.steps.reduce((m, t) => Math.max(m, t.advantage), 0);
const largest = solutions.reduce((m, s) => Math.max(m, highest(s), -lowest(s)), 1e-9);
function spread(step) {
  if (step.K === undefined || !step.K) return "";
  const error = Math.sqrt(step.value * (1 - step.value) / step.K);
  return ` \u00b1 ${error.toFixed(2)} (${step.right} of ${step.K} rollouts right)`;
}
function show(event) {
  const {step, after} = event.currentTarget.shown;
  tip.replaceChildren();
  if (step.value !== null) {
    tip.append(make("div", "", `value before ${fixed(step.value)}${spread(step)}`));
    const value = after.step && `value after ${fixed(after.step.value)}${spread(after.step)}`;
    tip.append(make("div", "", value || `reward ${after.reward}`));
  }
  const parts = step.target === undefined ? "" : ` = ${fixed(step.target)} \u2212 ${fixed(step.baseline)},`
    + " averages of the values after and before it";
  tip.append(make("div", "", `advantage ${signed(step.advantage)}${parts}`));
  for (const [reward, text] of step.rollouts || []) {
    const rollout = verdict(reward) + ", from before this step:\n" + text.trim();
    tip.append(make("pre", reward ? "right" : "wrong", rollout));
  }
  tip.hidden = false;
  const box = event.currentTarget.getClientRects()[0];
  const below = innerHeight - box.bottom - 12, above = box.top - 12;
  tip.style.maxHeight = "none";
  const size = tip.getBoundingClientRect(), under = size.height < below || below > above;
  tip.style.maxHeight = (under ? below : above) + "px";
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = under ? box.bottom + 4 + "px" : "auto";
  tip.style.bottom = under ? "auto" : innerHeight - box.top + 4 + "px";
}
let leaving;
const hide = () => { leaving = setTimeout(() => tip.hidden = true, 150); };
tip.onmouseenter = () => clearTimeout(leaving); tip.onmouseleave = hide;
document.addEventListener("keydown", e => { if (e.key === "Escape") tip.hidden = true; });
function card(s) {
  const article = make("article"), worst = lowest(s), solution = make("div", "solution");
  article.append(make("strong", "", verdict(s.reward) + (s.finished ? "" : ", unfinished")));
  article.append(make("span", "value", `the answer is ${s.answer}`));
  article.append(make("div", "prompt", s.prompt.trim()), solution);
  s.steps.forEach((step, i) => {
    const lead = step.text.match(/^\s*/)[0];
    const span = make("span", "step", step.text.slice(lead.length));
    solution.append(lead);
    if (step.value !== null) solution.append(make("span", "value", fixed(step.value)));
    const colour = step.advantage < 0 ? "--down" : "--up";
    const strength = (0.6 * Math.abs(step.advantage) / largest).toFixed(3);
    span.style.background = `rgb(var(${colour}) / ${strength})`;
    if (worst < 0 && step.advantage === worst && step.value !== null) span.classList.add("worst");
    span.tabIndex = 0;
    span.shown = {step, after: {step: s.steps[i + 1], reward: s.reward}};
    span.onmouseenter = e => { clearTimeout(leaving); show(e); };
    span.onfocus = show;
    span.onmouseleave = span.onblur = hide;
    solution.append(span);
  });
  const valued = s.steps.some(t => t.value !== null);
  if (valued) solution.append(make("span", "value", `reward ${s.reward}`));
  return article;
}
let chosen = [], drawn = 0;
function more() {
  main.append(...chosen.slice(drawn, drawn + 50).map(card));
  drawn = Math.min(chosen.length, drawn + 50);
  $("more").textContent = drawn < chosen.length ? "more below" : "";
}
function choose() {
  const which = $("which").value;
  chosen = solutions.filter(s => which === "all" || String(+s.reward) === which);
  if ($("order").value === "drop") chosen.sort((a, b) => lowest(a) - lowest(b));
  if ($("order").value === "rise") chosen.sort((a, b) => highest(b) - highest(a));
  $("count").textContent = `${chosen.length} of ${solutions.length}`;
  main.replaceChildren(); drawn = 0; more(); scrollTo(0, 0);
}
$("which").onchange = $("order").onchange = choose;
function scrolled(seen) { if (seen[0].isIntersecting && drawn < chosen.length) more(); }
new IntersectionObserver(scrolled, {rootMargin: "800px"}).observe($("more"));
choose();
</script></body></html>
"""


def as_page(title, solutions):
    """An HTML page that holds the solutions as JSON, in which no tag can begin or end."""
    content = json.dumps(dict(title=title, solutions=solutions), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return PAGE.replace("DATA", content, 1)


# --- as a picture ---


def draw(solution, path):
    """Draw the steps of one solution, shaded by their advantages, with the value before each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = solution["steps"]
    largest = max(abs(step["advantage"]) for step in steps) or 1.0
    figure, axis = plt.subplots(figsize=(4.6, 0.3 * (len(steps) + 2.4)), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(len(steps) + 0.7, -1.3))
    axis.axis("off")
    axis.text(0.1, -0.8, printable(solution["prompt"]), family="monospace", weight="bold", va="center")
    for x, head in ((6.9, "value"), (8.4, "advantage")):
        axis.text(x, -0.8, head, fontsize=8, va="center", color="#666666")
    for row, step in enumerate(steps):
        colour = "#0072b2" if step["advantage"] > 0 else "#d55e00"
        shade = 0.6 * abs(step["advantage"]) / largest
        axis.axhspan(row - 0.42, row + 0.42, 0, 1, facecolor=colour, alpha=shade, linewidth=0)
        axis.text(0.1, row, printable(step["text"]), family="monospace", va="center")
        if step["value"] is not None:
            axis.text(6.9, row, f"{step['value']:.2f}", va="center")
        axis.text(8.4, row, f"{step['advantage']:+.2f}", va="center")
    verdict = "right" if solution["reward"] else f"wrong: it is {printable(solution['answer'])}"
    axis.text(0.1, len(steps) + 0.2, verdict, fontsize=9, color="#666666", va="center")
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--iteration", type=int, help="a stored iteration; default: the last one")
    parser.add_argument("--out", type=Path, help="the page; default: RUN/show.html")
    picture = "draw the wrong solution with the largest drop instead"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    text = "print solution N (default 0) instead"
    parser.add_argument("--text", type=int, nargs="?", const=0, metavar="N", help=text)
    a = parser.parse_args()
    files = {int(path.name.split(".")[0]): path for path in (a.run / "episodes").glob("*.jsonl.gz")}
    if not files:
        sys.exit(
            f"show.py: {a.run} holds no stored responses: name a run that trained with --store_every above 0"
        )
    iteration = max(files) if a.iteration is None else a.iteration
    if iteration not in files:
        stored = ", ".join(map(str, sorted(files)))
        sys.exit(f"show.py: --iteration {iteration} was not stored in {a.run}: choose from {stored}")
    solutions = read_solutions(files[iteration])
    if a.text is not None:
        if not 0 <= a.text < len(solutions):
            sys.exit(f"show.py: --text {a.text} must be at least 0 and at most {len(solutions) - 1}")
        print(as_text(solutions[a.text]))
        return
    if a.picture:
        wrong = [s for s in solutions if not s["reward"] and s["finished"]]
        if not wrong:
            sys.exit(f"show.py: iteration {iteration} has no wrong solution to draw")
        draw(min(wrong, key=lambda s: min(step["advantage"] for step in s["steps"])), a.picture)
        return print(f"wrote {a.picture}")
    out = a.out or a.run / "show.html"
    out.write_text(as_page(f"{a.run.resolve().name}, iteration {iteration}", solutions), encoding="utf-8")
    print(f"wrote {out}: {len(solutions)} solutions of iteration {iteration}")


if __name__ == "__main__":
    main()
