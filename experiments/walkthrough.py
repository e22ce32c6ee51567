"""One problem, from prompt to gradient, by the project's own functions: writes docs/walkthrough.md.

    python experiments/walkthrough.py                  # needs runs/sft of `make demo`; 20 s on a CPU
    python experiments/walkthrough.py --links          # only brings the links up to date

Nothing is computed here that the training loop does not compute, but for the columns "formula". The
links name the lines of the functions; tests/test_walkthrough.py fails when a function has moved. The
numbers are the same on each run of one machine.
"""

import argparse
import importlib
import inspect
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import support.startup  # noqa: F401 (before torch is imported)

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

PAGE = ROOT / "docs" / "walkthrough.md"
PROBLEMS, RESPONSES, SEED = 40, 8, 1  # in which a pair of a right and a wrong response is looked for
SHOWN = 3  # states whose rollouts are printed; rollouts of each
TOKENS = [
    "So",
    " the",
    " radius",
    " $",
    "r",
    "$",
    " is",
    " 6",
    ".\nThe",
    " square",
    " has",
    " side",
    " 12",
    ".",
]
SOLUTION = r"""Let $r$ be the radius of the circle. Since its area is $36\pi$, we have $\pi r^2 = 36\pi$, so $r = 6$.
The square that surrounds the circle has side
\begin{align*}
s &= 2r \\
&= 12.
\end{align*}
Therefore its area is $s^2 = 144$, the area between the two is $144 - 36\pi$, and its perimeter is $4s = 48$.
The answer is $\boxed{144 - 36\pi}$."""


TEXT = """
# One problem, from prompt to update

Made by `python experiments/walkthrough.py` from the policy that `make demo` fine-tunes before RL; every number comes
from the functions that train.py calls, but for those in columns "formula", which are computed here once more. The task
is arithmetic from left to right, without precedence, one line an operation. The policy learned from solutions with
slips (a forgotten carry), so it slips too. ⏎ is a line end.

## 1. The prompt

{at[data.encode]} turns the problem into token ids, once. The engine and the trainer only ever get ids; text is for
cutting and grading. This tokenizer has a token for each character, and 1 begins every text (BOS).

{prompt}

## 2. Two responses

The engine, vLLM, samples responses at temperature 1 ({at[rollout.sample]}). {at[grader.set_rewards]} gives the reward
R: 1 if a response has ended and its final answer is right, else 0. Nothing else is graded: two slips that cancel each
other are worth 1. Of eight responses to this problem these two are taken, since they part ways early; in training
every response goes through what follows.

{responses}

## 3. Steps

{at[steps.split_steps]} cuts the text; {at[steps.token_boundaries]} carries the cuts over to the sampled ids, where a
token belongs to the step that holds its first character. Here each line is a step, its line end the step's first
token, and the `####` line belongs to the step before it, as in the paper. EOS, the token that ends a text, was sampled
like any other and belongs to the last step. Tokens a..b are a to b - 1.

{steps}

## 4. States

The state s_t is the prompt and the first t steps. {at[vine.states_of]} gives each distinct one a record, so a common
beginning is valued once: {distinct} states for {all_steps} steps. The finished text needs no value; R is known.

{tree}

A state is sent to the engine as the ids that were sampled, not as text. With real tokenizers the text might be split
into other tokens, and the value would be that of a state that the response never was in.

## 5. K = {K} rollouts from each

{at[vine:Vine.start]} submits the states of a response as soon as that response has ended. A rollout continues a state
by the same policy and settings; no gradient flows through it. The first three of the rollouts from three of the states,
with their reward (`..` is the state; a rollout from a wrong line is "right" where a second slip cancels the first):

{rollouts}

## 6. Values and advantages

V(s_t) is the mean reward of its K rollouts ({at[vine.monte_carlo_value]}): no network has to learn it, since text can
be reset to any of its prefixes. The advantage of step t is how the value changed in it, A_t = V(s_{{t+1}}) - V(s_t),
and R - V(s_t) for the last step ({at[vine.step_advantages]}). The standard error of V is sqrt(V (1 - V) / K); that of
A comes from both values, and as neighbours share one, their errors have opposite signs. (Where all K agree the formula
says 0; 9 of 9 means no more than that V is likely above 0.7.)

{values}

The A of a response add up to R - V(s_0), what it did better or worse than expected. A measures the chance of a reward,
not correctness: a line that is right in itself loses value if the policy might have slipped there in a way that
cancelled an earlier slip. And an A within its error is noise. Noise averages out over the iterations. More rollouts
make it smaller; so do averages of the values along a response, an option that is off here
({at[vine.targets_and_baselines]}).

## 7. Tokens, whitened

Every token of a step gets its A ({at[vine.token_advantages]}), so a long step weighs more. Then the advantages of all
sampled tokens of an iteration are whitened ({at[ppo.whiten]}), so that the size of an update depends neither on how
rare rewards are nor on their scale. Here the iteration is these two responses, {count} tokens: mean {mean}, standard
deviation (n - 1) {deviation}.

{white}

An A of 0 becomes -(mean) / (deviation), which is small and the same for all. From here on A is the whitened one.

## 8. The loss of five tokens

pi is the policy that is trained, pi_old the one that sampled, pi_ref the one before RL; here the last two are the
same. One optimizer step was made ({at[ppo:Trainer.update]}: AdamW, learning rate {rate:g}, whose first step moves every
weight by about that much). For the next one on the same responses {at[ppo.ppo_loss]} compares pi with pi_old:
ratio = exp(log pi - log pi_old). A token's part of the policy loss is max(-A ratio, -A clip(ratio, 0.8, 1.2)), and the
KL to the reference is estimated by exp(d)-d-1 with d = log pi_ref - log pi ({at[ppo.k3]}). All responses are packed
into one row and take one forward pass ({at[model.Policy]}). These are the five tokens whose log pi changed most, named
by their place in the response, from 0:

{five}

The policy loss is the mean over the tokens of a minibatch. The KL is a sum over each response's tokens, averaged over
responses, as in the released code. The loss is the first plus {kl_coef:g} times the second. The same function on these
five tokens alone:

{five_together}

A clipped token gets no gradient from the policy loss: it has moved beyond the range in the direction of its
advantage. Here one optimizer step did that. The clip does not undo such a move; it keeps the next optimizer steps from
going further. A token beyond the range on the other side, against its advantage, would not be clipped, so it can come
back; the weights are shared, so pushing some tokens moves others. Where the two responses part ways their tokens are
alternatives after the same prefix: as one rises the other falls.

## 9. Who is blamed

In the wrong response the value falls most at `{fallen}`, and the token of it that the policy was least sure of is
`{unsure}`. RLOO (REINFORCE, leave one out) has no values: every token gets R minus the other response's R, +1 in the
right one and -1 in the wrong one ({at[baselines.groups:rloo]}), not whitened. The change of that token's
log-probability in one optimizer step from the same start, and the mean absolute change over the tokens in the other
lines of the wrong response:

{moves}

They are much alike because of this task: the policy is nearly sure of almost all other tokens, so there is little to
blame wrongly. Where the two responses are still alike RLOO's +1 and -1 even cancel, while VinePPO gives the shared step
its one A twice, noise included. In language many tokens are free, and RLOO pushes at all of them. One optimizer step
cannot show what that costs. The noise of the gradient over many batches can: [when-it-pays.md](when-it-pays.md).

## 10. The same cuts in LaTeX

A solution with LaTeX, as in the MATH dataset, is cut by other rules of {at[steps.split_steps]}: at line ends, at ends
of sentences outside of formulas, at the lines of a displayed formula. A piece of more than {rules.LONG} characters is
cut again near its middle: outside of formulas after a comma, "and", ":" or "to", if that leaves {rules.HALF_TEXT}
characters on both sides, else inside of one after "=", if that leaves {rules.HALF_FORMULA}. A fragment of fewer than
{rules.SHORT} characters joins its neighbour (`\\begin{{align*}}` is no step). White space begins the next step.

{latex}

The tokens of a language model may span a cut, as `{spanning}` does in this made-up example. It belongs to the step
before it; so a rollout that continues after that step begins with a word of the next one ({at[steps.token_starts]}
finds the character at which each token begins):

{tokens}

## What was left out

An iteration of the paper has 64 problems x 8 responses and 16 optimizer steps, on several GPUs: {at[vine:Vine.deal]}
moves waiting states to the engines with less to do, and {at[model.ChunkedLogprobs]} makes log-probabilities without
holding the logits of all tokens. The loop that calls it all is {at[train.train]}.
"""


def shown(text):
    """Text for one line of a code block."""
    return text.replace("\n", "⏎") or "(nothing)"


def block(lines):
    return "```\n" + "\n".join(lines) + "\n```\n"


def table(head, rows):
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


# --- the stations ---


class Walk:
    """The engine, the grader and the settings; what is found on the way."""

    def __init__(self, path, device):
        from rollout import Engine
        from support.pretrained import load_tokenizer

        options = f"--dataset arithmetic --model {path} --prompts_per_iteration 1 --responses_per_prompt 2"
        self.s = train.parse_settings([*options.split(), "--minibatch", "2", "--K", "9", "--epochs", "1"])
        self.tokenizer, self.device = load_tokenizer(self.s), device
        self.engine = Engine(path, max_sequence=self.s.max_sequence, stop=[])
        self.grader = grader.Grader()
        self.engine.seed(SEED)

    def pair(self):
        """(problem, right response, wrong response) that share a step and part ways at the next or a later one."""
        from rollout import episodes_for, sample

        problems = data.encode(data.load("arithmetic")[1][:PROBLEMS], self.tokenizer, 100)[0]
        for problem in problems:
            episodes = episodes_for([problem], RESPONSES)
            sample(self.engine, self.grader, episodes, self.s)
            for e in episodes:
                found = steps.step_boundaries("paper", e.text, e.response_ids, self.engine.decode)
                e.boundaries = found
            for right in (e for e in episodes if e.reward):
                for wrong in (e for e in episodes if not e.reward and e.finished):
                    shared = common_steps(right, wrong)
                    if 1 <= shared <= 2 and 4 <= len(right.boundaries) <= 6:
                        return problem, right, wrong
        sys.exit(f"walkthrough.py: no pair of responses among {PROBLEMS} problems: take another SEED")

    def value(self, episodes):
        """Values and advantages of the two responses, as train.py gets them. Returns the distinct states."""
        estimator = vine.Vine(self.engine, self.grader, self.s)
        for e in episodes:
            estimator.start(e)
        estimator.finish()
        states = list(estimator.known.values())
        estimator.set_advantages(episodes)
        return states

    def update(self, episodes, whiten):
        """(old, new, reference log-probabilities), [N] each, of one optimizer step from the SFT policy."""
        trainer = ppo.Trainer(
            self.s.model, self.device, learning_rate=self.s.learning_rate, temperature=self.s.temperature,
            whiten_advantages=whiten, **train.learning(self.s) | dict(total_steps=1),
        )  # fmt: skip
        old, reference, _ = trainer.score(episodes)
        trainer.update(episodes)
        new, _, _ = trainer.score(episodes)
        return old, new, reference


def common_steps(a, b):
    """Steps with which two responses begin alike."""
    count = 0
    for stop in a.boundaries[1:]:
        if stop not in b.boundaries or a.response_ids[:stop] != b.response_ids[:stop]:
            break
        count += 1
    return count


def common_states(a, b):
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


def latex():
    """The section about a LaTeX solution."""
    cuts = steps.split_steps(SOLUTION)
    rows = [
        (t, f"`{shown(SOLUTION[a:b]).replace('|', chr(92) + '|')}`", rule_of(SOLUTION, a))
        for t, (a, b) in enumerate(zip(cuts, cuts[1:]))
    ]
    return table(["step", "text", "why it begins there"], rows)


def across_a_cut():
    """{spanning, tokens} of the page."""
    text = "".join(TOKENS)
    cuts = steps.split_steps(text)
    starts = steps.token_starts(range(len(TOKENS)), lambda ids: "".join(TOKENS[i] for i in ids))
    boundaries = steps.token_boundaries(cuts, starts)
    rows = []
    for t, ((a, b), (i, j)) in enumerate(zip(zip(cuts, cuts[1:]), zip(boundaries, boundaries[1:]))):
        rows.append((t, f"`{shown(text[a:b])}`", " ".join(f"`{shown(token)}`" for token in TOKENS[i:j])))
    return dict(spanning=shown(TOKENS[boundaries[1] - 1]), tokens=table(["step", "text", "its tokens"], rows))


def page(walk):
    """The text of docs/walkthrough.md."""
    decode, k = walk.engine.decode, walk.s.K
    problem, right, wrong = walk.pair()
    both = {"right": right, "wrong": wrong}
    states = walk.value([right, wrong])
    old, new, reference = walk.update([right, wrong], whiten=True)
    fork = common_states(right, wrong)
    chosen = {"s_0": right.states[0]}
    chosen |= {f"s_{fork} of the {name} response": e.states[fork] for name, e in both.items()}
    parts = dict(
        prompt=block([shown(problem.prompt), str(problem.prompt_ids)]),
        responses="\n".join(
            block([f"{name}, R = {e.reward:g}, {len(e.response_ids)} tokens", *e.text.split("\n")])
            for name, e in both.items()
        ),
        steps="\n".join(table_of_steps(name, e, decode) for name, e in both.items()),
        distinct=len(states),
        all_steps=len(right.states) + len(wrong.states),
        tree=block(tree(right, wrong, decode)),
        K=k,
        rollouts="\n".join(rollouts_of(title, state, decode) for title, state in chosen.items()),
        values="\n".join(table_of_values(name, e, k, decode) for name, e in both.items()),
        rate=walk.s.learning_rate,
        kl_coef=walk.s.kl_coef,
        rules=steps,
        latex=latex(),
        **across_a_cut(),
    )
    parts |= (
        whitening(both, decode) | five_tokens(both, old, new, reference, decode) | blame(walk, both, old, new)
    )
    text = TEXT.format(at=Links(), **parts)
    return "\n\n".join(wrapped(paragraph) for paragraph in text.strip().split("\n\n")) + "\n"


def wrapped(paragraph):
    """Prose in lines of at most 110 characters; blocks, tables and lists as they are."""
    if paragraph.startswith(("```", "|", "#", "- ")) or "```" in paragraph:
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 110, break_long_words=False, break_on_hyphens=False)


class Links:
    """Links()["vine.states_of"]: Markdown, the name with a link to the function's line."""

    def __getitem__(self, name):
        """name: "module.function", or "module:Class.method"."""
        module, path = name.split(":") if ":" in name else name.rsplit(".", 1)
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
        file = Path(inspect.getsourcefile(thing)).relative_to(ROOT)
        return f"[{name.replace(':', '.')}](../{file}#L{inspect.getsourcelines(thing)[1]})"


def relinked(text):
    """A page with the lines of its links as the functions are now."""

    def new(found):
        module, *path = found[1].split(".")
        if module == "baselines":
            module, path = f"{module}.{path[0]}", path[1:]
        return Links()[f"{module}:{'.'.join(path)}"]

    return re.sub(r"\[([\w.]+)\]\(\.\./[\w/]+\.py#L\d+\)", new, text)


def table_of_steps(name, e, decode):
    last = len(e.states) - 1
    rows = [
        (t, f"{a}..{b}", f"`{shown(text)}`" + (" and EOS" if t == last else ""))
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
    right = [round(v * k) for v in e.step_values]  # of K
    variances = [v * (1 - v) / k for v in e.step_values] + [0.0]
    after, rows = [*right[1:], round(e.reward * k)], []
    for t, text in enumerate(pieces(e, decode)):
        last = t == len(right) - 1
        error = math.sqrt(variances[t] + variances[t + 1])
        ends = f"R = {e.reward:g}" if last else f"{after[t]}/{k}"
        advantage = f"{after[t] - right[t]:+d}/{k} = {(after[t] - right[t]) / k:+.2f} ± {error:.2f}"
        rows.append((f"`{shown(text)}`", f"{right[t]}/{k}", ends, advantage))
    total = f"{after[-1] - right[0]:+d}/{k} = R - V(s_0) = {e.reward:g} - {right[0]}/{k}"
    return table([f"step of the {name} one", "V before", "V after", "A"], rows) + f"\nTogether {total}.\n"


def whitening(both, decode):
    """{white, count, mean, deviation} of the page."""
    advantages = torch.tensor([a for e in both.values() for a in e.advantages])
    white, rows, offset = ppo.whiten(advantages), [], 0
    mean, deviation = advantages.mean().item(), advantages.std().item()
    for name, e in both.items():
        for a, b, text in zip(e.boundaries, e.boundaries[1:], pieces(e, decode)):
            value, by_function = advantages[offset + a].item(), white[offset + a].item()
            by_formula = (value - mean) / deviation
            numbers = f"{value:+.4f}", f"{by_function:+.4f}", f"{by_formula:+.4f}"
            rows.append((name, f"`{shown(text)}`", b - a, *numbers))
        offset += len(e.response_ids)
    head = ["response", "step", "tokens", "A", "whitened", "formula"]
    return dict(
        white=table(head, rows), count=len(advantages), mean=f"{mean:+.5f}", deviation=f"{deviation:.5f}"
    )


def five_tokens(both, old, new, reference, decode):
    """{five, five_together} of the page."""
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
        token = f"{'right' if i < n else 'wrong'} {i % n if i < n else i - n}: `{shown(decode([ids[i]]))}`"
        numbers = f"{old[i]:.3f}", f"{new[i]:.3f}", f"{ratio:.3f}", f"{a:+.3f}", f"{loss:+.3f}"
        rows.append((token, *numbers, "yes" if clipped else "", f"{kl:.4f}"))
    head = ["token", "log pi_old", "log pi", "ratio", "A, whitened", "policy loss", "clipped", "KL"]
    take = torch.tensor(five)
    _, metrics = ppo.ppo_loss(new[take], old[take], reference[take], white[take], 1, clip=0.2, kl_coef=1.0)
    losses, kls, limited = zip(*by_formula)
    together = [
        ("mean policy loss", f"{metrics['policy_loss']:+.5f}", f"{statistics.mean(losses):+.5f}"),
        ("sum of KL", f"{metrics['kl_loss']:.5f}", f"{sum(kls):.5f}"),
        ("share that is clipped", f"{metrics['clip_fraction']:.2f}", f"{statistics.mean(limited):.2f}"),
    ]
    return dict(five=table(head, rows), five_together=table(["", "ppo_loss", "formula"], together))


def blame(walk, both, old, new):
    """{fallen, unsure, moves} of the page: how the wrong step's token moves, and how with RLOO."""
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
    unsure = shown(decode([wrong.response_ids[token]]))
    return dict(fallen=shown(decode(wrong.response_ids[a:b])), unsure=unsure, moves=table(head, rows))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="runs/sft", help="the SFT policy of `make demo`")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    parser.add_argument("--links", action="store_true", help="bring the page's links up to date")
    a = parser.parse_args()
    if a.links:
        return a.out.write_text(relinked(a.out.read_text()))
    if not (Path(a.model) / "config.json").is_file():
        sys.exit(f"walkthrough.py: there is no model in {a.model}: run `make demo`, or sft.py alone")
    walk = Walk(a.model, init_distributed())
    a.out.write_text(page(walk))
    print(f"wrote {a.out}")
    walk.grader.close()
    walk.engine.shutdown()
    exit_all()


if __name__ == "__main__":
    main()
