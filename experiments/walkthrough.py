"""One problem, from its prompt to the gradient, by the project's own functions: the numbers of docs/walkthrough.md.

    python experiments/walkthrough.py                  # fills them in; needs runs/sft of `make demo`; 20 s on a CPU
    python experiments/walkthrough.py --check          # only compares; exit code 1 if a place of the page differs
    python experiments/walkthrough.py --links          # only brings the links up to date

The page holds the prose. The program fills the places between <!-- NAME --> and <!-- /NAME -->, which are
blocks or parts of a sentence, and the lines that the links name. It computes nothing that the training loop
does not compute, except the columns "formula". The numbers are the same on each run of one machine.
"""

import importlib
import inspect
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common

# isort: split
import torch

import data
import grader
import ppo
import steps
import train
import vine
from baselines.groups import Group, rloo
from support.ranks import exit_all, init_distributed

PAGE = common.ROOT / "docs" / "walkthrough.md"
PROBLEMS, RESPONSES, SEED = 40, 8, 1  # among which the pair of a right and a wrong response is found
SHOWN = 3  # rollouts of a state in the page
PLACE = re.compile(r"(<!-- (\w+) -->\n?)(.*?)(\n?<!-- /\2 -->)", re.DOTALL)
TOKENS = "So| the| radius| $|r|$| is| 6|.\nThe| square| has| side| 12|.".split("|")
SOLUTION = r"""Let $r$ be the radius of the circle. Since its area is $36\pi$, we have $\pi r^2 = 36\pi$, so $r = 6$.
The square that surrounds the circle has side
\begin{align*}
s &= 2r \\
&= 12.
\end{align*}
Therefore its area is $s^2 = 144$, the area between the two is $144 - 36\pi$, and its perimeter is $4s = 48$.
The answer is $\boxed{144 - 36\pi}$."""

# --- the page ---


def places(page):
    """{name: text} of the marked places of a page."""
    return {name: text for _, name, text, _ in PLACE.findall(page)}


def filled(page, found):
    """A page with the texts {name: text} in its marked places, and with the lines of its links as they are now."""
    return relinked(PLACE.sub(lambda place: place[1] + found[place[2]] + place[4], page))


def link(name):
    """Markdown: "module.function" or "module.Class.method", with a link to its line."""
    module, path = name.split("."), []
    while not (common.ROOT / "/".join(module)).with_suffix(".py").is_file():
        path.insert(0, module.pop())
    thing = importlib.import_module(".".join(module))
    for part in path:
        thing = getattr(thing, part)
    file = Path(inspect.getsourcefile(thing)).relative_to(common.ROOT)
    return f"[{name}](../{file}#L{inspect.getsourcelines(thing)[1]})"


def relinked(page):
    """A page with the lines of its links as the functions are now."""
    return re.sub(r"\[([\w.]+)\]\(\.\./[\w/]+\.py#L\d+\)", lambda found: link(found[1]), page)


def shown(text):
    """Text for one line of a code block."""
    return text.replace("\n", "⏎") or "(nothing)"


def code(text):
    return f"`{shown(text)}`"


def block(lines):
    return "\n".join(["```", *lines, "```"])


def table(head, rows):
    return "\n".join(common.table(head, rows))


# --- the stations ---


class Walk:
    """The engine, the grader and the settings of the walk."""

    def __init__(self, path, device):
        from rollout import Engine
        from support.pretrained import load_tokenizer

        sizes = (
            "--iterations 1 --prompts_per_iteration 1 --responses_per_prompt 2 --minibatch 2 --epochs 1 --K 9"
        )
        self.s = train.parse_settings(["--dataset", "arithmetic", "--model", str(path), *sizes.split()])
        self.tokenizer, self.device = load_tokenizer(self.s), device
        self.engine, self.grader = Engine(self.s), grader.Grader()
        self.engine.seed(SEED)

    def pair(self):
        """(problem, right response, wrong response) that share a step or two and then diverge."""
        from rollout import episodes_for, sample

        problems = data.encode(data.load("arithmetic")[1][:PROBLEMS], self.tokenizer, 100)[0]
        for problem in problems:
            episodes = episodes_for([problem], RESPONSES)
            sample(self.engine, self.grader, episodes, self.s)
            for e in episodes:
                e.boundaries = steps.step_boundaries("paper", e.text, e.response_ids, self.engine.decode)
            for right in (e for e in episodes if e.reward):
                for wrong in (e for e in episodes if not e.reward and e.finished):
                    if common_steps(right, wrong) in (1, 2) and 4 <= len(right.boundaries) <= 6:
                        return problem, right, wrong
        sys.exit(f"walkthrough.py: {PROBLEMS} problems have no such pair of responses: change SEED")

    def value(self, episodes):
        """Values and advantages of the two responses, as in train.py. Returns the distinct states."""
        estimator = vine.Vine(self.engine, self.grader, self.s)
        for e in episodes:
            estimator.start(e)
        estimator.wait()
        estimator.set_advantages(episodes)
        return estimator.states

    def update(self, episodes, whiten):
        """(old, new, reference log-probabilities), [N] each, of one optimizer step from the SFT policy."""
        trainer = ppo.Trainer(replace(self.s, whiten=whiten), self.device)
        old, reference, _ = trainer.score(episodes)
        trainer.update(episodes)
        new, _, _ = trainer.score(episodes)
        return old, new, reference


def common_steps(a, b):
    """The number of steps with which two responses begin alike."""
    count = 0
    for stop in a.boundaries[1:]:
        if stop not in b.boundaries or a.response_ids[:stop] != b.response_ids[:stop]:
            break
        count += 1
    return count


def common_states(a, b):
    """The number of states that two responses share."""
    return sum(x is y for x, y in zip(a.states, b.states))


def pieces(e, decode):
    """The text of each step."""
    return [decode(e.response_ids[a:b]) for a, b in zip(e.boundaries, e.boundaries[1:])]


def tree(right, wrong, decode):
    """Lines: the states of the two responses, equal ones once."""
    shared = common_states(right, wrong)
    lines = ["s_0  the prompt"]
    texts = pieces(right, decode)
    for t in range(1, shared):
        lines.append("     " + "  " * (t - 1) + f"└ {shown(texts[t - 1])}    s_{t} of both")
    for e, name, mark in ((right, "right", "├"), (wrong, "wrong", "└")):
        texts = pieces(e, decode)
        for t in range(shared, len(e.states)):
            indent = "     " + "  " * (t - 1)
            if name == "right" and t > shared:  # a bar down to the other branch
                indent = "     " + "  " * (shared - 1) + "│ " + "  " * (t - shared - 1)
            lines.append(
                f"{indent}{mark if t == shared else '└'} {shown(texts[t - 1])}    s_{t} of the {name} one"
            )
    return lines


def rule_of(text, cut):
    """Why split_steps cut a LaTeX text there, read off the text."""
    before, after = text[:cut].rstrip(), text[cut:]
    if cut == 0:
        return "the beginning"
    if after.startswith("\n"):
        inside = before.count(r"\begin{") > before.count(r"\end{")
        return "a line of a display" if inside else "a new line"
    if before.endswith((".", "!", "?")):
        return "a sentence ends before a capital letter"
    return f"the piece before it was longer than {steps.LONG} characters: cut after {before[-1]!r}"


def about_latex():
    """{name: text} of the section about LaTeX."""
    cuts, rows = steps.split_steps(SOLUTION), []
    for t, (a, b) in enumerate(zip(cuts, cuts[1:])):
        rows.append((t, code(SOLUTION[a:b]).replace("|", r"\|"), rule_of(SOLUTION, a)))
    rules = {name: str(getattr(steps, name)) for name in ("LONG", "HALF_TEXT", "HALF_FORMULA", "SHORT")}
    return rules | {"latex": table(["step", "text", "why it begins there"], rows)} | across_a_cut()


def across_a_cut():
    text = "".join(TOKENS)
    cuts = steps.split_steps(text)
    starts = steps.token_starts(range(len(TOKENS)), lambda ids: "".join(TOKENS[i] for i in ids))
    boundaries = steps.token_boundaries(cuts, starts)
    rows = []
    for t, (a, b) in enumerate(zip(cuts, cuts[1:])):
        tokens = TOKENS[boundaries[t] : boundaries[t + 1]]
        rows.append((t, code(text[a:b]), " ".join(map(code, tokens))))
    spanning = code(TOKENS[boundaries[1] - 1])
    return {"spanning": spanning, "cut": table(["step", "text", "its tokens"], rows)}


def measured(walk):
    """{name: text} of all marked places of the page."""
    decode, k = walk.engine.decode, walk.s.K
    problem, right, wrong = walk.pair()
    both = {"right": right, "wrong": wrong}
    states = walk.value([right, wrong])
    old, new, reference = walk.update([right, wrong], whiten=True)
    fork = common_states(right, wrong)
    chosen = {"s_0": right.states[0]}
    chosen |= {f"s_{fork} of the {name} response": e.states[fork] for name, e in both.items()}
    found = dict(
        prompt=block([shown(problem.prompt), str(problem.prompt_ids)]),
        responses="\n\n".join(
            block([f"{name}, R = {e.reward:g}, {len(e.response_ids)} tokens", *e.text.split("\n")])
            for name, e in both.items()
        ),
        steps="\n\n".join(table_of_steps(name, e, decode) for name, e in both.items()),
        count=f"{len(states)} states for {len(right.states) + len(wrong.states)} steps",
        states=block(tree(right, wrong, decode)),
        K=str(k),
        rollouts="\n\n".join(rollouts_of(title, state, decode) for title, state in chosen.items()),
        values="\n\n".join(table_of_values(name, e, k, decode) for name, e in both.items()),
        rate=f"{walk.s.learning_rate:g}",
        kl_coef=f"{walk.s.kl_coef:g}",
    )
    found |= whitening(both, decode) | five_tokens(both, old, new, reference, decode)
    return found | blame(walk, both, old, new) | about_latex()


def table_of_steps(name, e, decode):
    last = len(e.states) - 1
    rows = [
        (t, f"{a}..{b}", code(text) + (" and EOS" if t == last else ""))
        for t, (a, b, text) in enumerate(zip(e.boundaries, e.boundaries[1:], pieces(e, decode)))
    ]
    return table([f"step of the {name} one", "tokens", "text"], rows)


def rollouts_of(title, state, decode):
    lines = [
        f"{title}: {sum(r.reward for r in state.rollouts):.0f} of its {len(state.rollouts)} rollouts are right"
    ]
    for r in state.rollouts[:SHOWN]:
        lines.append(f"  {'right' if r.reward else 'wrong'}  ..{shown(decode(r.token_ids))}")
    return block(lines)


def table_of_values(name, e, k, decode):
    values = [state.value for state in e.states]
    right = [round(v * k) for v in values]  # of K
    variances = [v * (1 - v) / k for v in values] + [0.0]
    after, rows = [*right[1:], round(e.reward * k)], []
    for t, text in enumerate(pieces(e, decode)):
        last = t == len(right) - 1
        error = math.sqrt(variances[t] + variances[t + 1])
        ends = f"R = {e.reward:g}" if last else f"{after[t]}/{k}"
        advantage = f"{after[t] - right[t]:+d}/{k} = {(after[t] - right[t]) / k:+.2f} ± {error:.2f}"
        rows.append((code(text), f"{right[t]}/{k}", ends, advantage))
    total = f"Together {after[-1] - right[0]:+d}/{k} = R - V(s_0) = {e.reward:g} - {right[0]}/{k}."
    return table([f"step of the {name} one", "V before", "V after", "A"], rows) + f"\n\n{total}"


def whitening(both, decode):
    """{name: text} of the section about whitening."""
    advantages = torch.tensor([a for e in both.values() for a in e.advantages])
    white, rows, offset = ppo.whiten(advantages), [], 0
    mean, deviation = advantages.mean().item(), advantages.std().item()
    for name, e in both.items():
        for a, b, text in zip(e.boundaries, e.boundaries[1:], pieces(e, decode)):
            value, by_function = advantages[offset + a].item(), white[offset + a].item()
            by_formula = (value - mean) / deviation
            numbers = f"{value:+.4f}", f"{by_function:+.4f}", f"{by_formula:+.4f}"
            rows.append((name, code(text), b - a, *numbers))
        offset += len(e.response_ids)
    head = ["response", "step", "tokens", "A", "whitened", "formula"]
    moments = f"{len(advantages)} tokens, mean {mean:+.5f}, standard deviation (n - 1) {deviation:.5f}"
    return dict(whitened=table(head, rows), moments=moments)


def five_tokens(both, old, new, reference, decode):
    """{name: text} of the section about the loss."""
    right, wrong = both.values()
    n, ids = len(right.response_ids), right.response_ids + wrong.response_ids
    white = ppo.whiten(torch.tensor(right.advantages + wrong.advantages))
    five = sorted(torch.topk((new - old).abs(), 5).indices.tolist())
    rows, by_formula = [], []
    for i in five:
        ratio, a = math.exp(new[i].item() - old[i].item()), white[i].item()
        loss = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        d = reference[i].item() - new[i].item()
        kl, clipped = math.exp(d) - d - 1, loss > -a * ratio
        by_formula.append((loss, kl, clipped))
        token = f"{f'right {i}' if i < n else f'wrong {i - n}'}: {code(decode([ids[i]]))}"
        numbers = f"{old[i]:.3f}", f"{new[i]:.3f}", f"{ratio:.3f}", f"{a:+.3f}", f"{loss:+.3f}"
        rows.append((token, *numbers, "yes" if clipped else "", f"{kl:.4f}"))
    head = ["token", "log pi_old", "log pi", "ratio", "A, whitened", "policy loss", "clipped", "KL"]
    take = torch.tensor(five)
    _, metrics = ppo.ppo_loss(new[take], old[take], reference[take], white[take], 1, 5, kl_coef=1.0)
    losses, kls, limited = zip(*by_formula)
    together = [
        ("mean policy loss", f"{metrics['policy_loss']:+.5f}", f"{statistics.mean(losses):+.5f}"),
        ("sum of KL", f"{metrics['kl_loss']:.5f}", f"{sum(kls):.5f}"),
        ("share that is clipped", f"{metrics['clip_fraction']:.2f}", f"{statistics.mean(limited):.2f}"),
    ]
    return dict(five=table(head, rows), together=table(["", "ppo_loss", "formula"], together))


def blame(walk, both, old, new):
    """{name: text} of the section about blame: how a token of the wrong step moves with VinePPO and with RLOO."""
    right, wrong = both.values()
    decode, n = walk.engine.decode, len(right.response_ids)
    advantages = [wrong.advantages[a] for a in wrong.boundaries[:-1]]
    step = advantages.index(min(advantages))
    a, b = wrong.boundaries[step], wrong.boundaries[step + 1]
    token = a + min(range(b - a), key=lambda i: old[n + a + i].item())
    others = [n + i for i in range(len(wrong.response_ids)) if not a <= i < b]
    Group(rloo, 2).set_advantages([right, wrong])
    old_rloo, new_rloo, _ = walk.update([right, wrong], whiten=False)
    rows = []
    for name, before, after in (("VinePPO", old, new), ("RLOO", old_rloo, new_rloo)):
        moved = after[n + token] - before[n + token]
        rest = statistics.mean(abs(after[i] - before[i]).item() for i in others)
        numbers = f"{before[n + token]:.3f}", f"{after[n + token]:.3f}", f"{moved:+.3f}", f"{rest:.4f}"
        rows.append((name, *numbers))
    head = ["advantages", "log pi before", "after", "change", "other steps, mean absolute change"]
    unsure = code(decode([wrong.response_ids[token]]))
    return dict(fallen=code(decode(wrong.response_ids[a:b])), unsure=unsure, blame=table(head, rows))


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="runs/sft", help="the SFT policy of `make demo`")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; default: docs/walkthrough.md")
    parser.add_argument("--check", action="store_true", help="compare the page with what is measured")
    parser.add_argument("--links", action="store_true", help="bring the page's links up to date")
    a = parser.parse_args()
    page = a.page.read_text()
    if a.links:
        return a.page.write_text(relinked(page))
    if not (Path(a.model) / "config.json").is_file():
        sys.exit(f"walkthrough.py: there is no model in {a.model}: run `make demo`, or sft.py alone")
    walk = Walk(a.model, init_distributed())
    found = measured(walk)
    walk.grader.close()
    walk.engine.shutdown()
    exit_all(finish(a, page, found))


def finish(a, page, found):
    """Write or check the page. Returns the exit code."""
    there = places(page)
    if odd := sorted(there.keys() ^ found.keys()):
        print(f"walkthrough.py: only one of {a.page} and this program has {', '.join(odd)}", file=sys.stderr)
        return 1
    differ = [name for name, text in found.items() if there[name] != text]
    if relinked(page) != page:
        differ.append("links")
    if a.check and differ:
        print(f"walkthrough.py: {a.page} differs in {', '.join(differ)}", file=sys.stderr)
        return 1
    if not a.check:
        a.page.write_text(filled(page, found))
    changed = f"changed {', '.join(differ)}" if differ else "the page is as measured"
    print(f"{a.page}: {changed}")
    return 0


if __name__ == "__main__":
    main()
