"""A run: where it starts or resumes, its iterations and phases, and what it writes."""

import json
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from episode import Episode
from support import run_folder
from support.checks import disagreement, without_reward
from support.metrics import Phases, evaluation_metrics, iteration_metrics, rounded
from support.ranks import from_rank_0, gather_lists
from support.settings import may_change
from support.watch import Stopped

KEPT_CHECKPOINTS = 2  # the newest ones, each with the state to resume from


class Run:
    """The run in --run_dir, new or to be resumed. Raises ValueError if the folder holds another run.

    Made from settings alone, before the ranks have joined: has_ended, lock, check_inputs. Then, on all ranks: join,
    agrees, and inside of `saved`, for each of iterations: finished.
    """

    def __init__(self, s):
        self.s, self.folder = s, Path(s.run_dir)
        self.lines, self.warned, self.accuracy, self.progress = [], set(), None, None
        self.day = run_folder.first_day(self.folder)
        self._find_start()

    def _find_start(self):
        """Set done, checkpoint (None: from the beginning), and changed (what settings are new).

        A run that was killed before its first checkpoint starts again.
        """
        self.done, self.checkpoint = run_folder.newest_checkpoint(self.folder)
        self.changed = []
        stored = (self.checkpoint / "state" if self.checkpoint else self.folder) / "settings.json"
        if not stored.exists():
            self.done, self.checkpoint = 0, None
            return
        before, now = run_folder.read_json(stored), asdict(self.s)
        changed = [name for name, value in now.items() if name in before and before[name] != value]
        changed = {name: f"--{name} was {before[name]}, now {now[name]}" for name in changed}
        refused = [words for name, words in changed.items() if name not in may_change(self.s)]
        if refused:
            raise ValueError(
                f"--run_dir {self.folder} holds a run with other settings: {'; '.join(refused)}: "
                "name another folder, or take them back"
            )
        self.changed = [words for name, words in changed.items() if name != "run_dir"]

    def has_ended(self):
        return run_folder.whole(self.folder / "model")

    def lock(self):
        """Keep other processes out, on rank 0. Raises ValueError where one is in the folder."""
        self.locked = run_folder.lock(self.folder)
        self._find_start()  # once more: a run that was ending may have saved since
        self.lines = run_folder.read_metrics(self.folder, self.done)

    def check_inputs(self, inputs):
        """On rank 0, after lock: inputs, {name: hash}, are what the run was begun with, or ValueError."""
        self.inputs, path = inputs, self.folder / "inputs.json"
        before = run_folder.read_json(path) if self.checkpoint and path.exists() else inputs
        changed = [name for name, value in inputs.items() if before.get(name, value) != value]
        if changed:
            raise ValueError(
                f"--run_dir {self.folder} was begun with other files: {' and '.join(changed)} changed since; "
                "put them back, or name another folder"
            )

    def join(self, engine, grader, trainer, estimator, tokenizer, evaluate):
        """On all ranks: what the run is made of, set back to the checkpoint from which it resumes.

        evaluate() returns this rank's episodes of an evaluation.
        """
        self.watch, self.engine, self.grader = engine.watch, engine, grader
        self.trainer, self.estimator, self.tokenizer, self.evaluate = trainer, estimator, tokenizer, evaluate
        self.watch.follow(trainer.policy, trainer.reference, *estimator.networks)
        start = self.done, self.checkpoint, self.changed, self.lines
        self.done, self.checkpoint, self.changed, self.lines = from_rank_0(start)
        self.first = dist.get_rank() == 0
        self.saved_until = self.done
        self.accuracy = next((x["accuracy"] for x in reversed(self.lines) if "accuracy" in x), None)
        self.phase = Phases(engine)
        if self.checkpoint:
            trainer.load(self.checkpoint / "state" / "policy")
            estimator.load(self.checkpoint / "state")
            where = f"resumes after iteration {self.done}, from {self.checkpoint}"
            self.say("; ".join([where, *self.changed]))
        engine.load_weights(trainer.weights())

    def agrees(self, problems):
        """Whether engine and trainer compute alike, before anything is trained; says it if they do not.

        On 16 tokens to each of 16 problems, other samples on each engine: in bfloat16 a few rare tokens round
        far more than the mean.
        """
        self.engine.seed(self.s.seed)
        episodes = [Episode(p.prompt_ids) for p in problems[:16]]
        for e in episodes:
            self.engine.submit(e, 1, min(16, self.s.max_tokens), 1.0, logprobs=True)
        while self.engine.running:
            for e, completions in self.engine.step():
                e.receive(completions)
        self.engine.sleep()
        _, _, metrics = self.trainer.score(episodes)
        text = disagreement(metrics["logprob_gap"], self.trainer.dtype)
        if text:
            self.say(text)
        else:
            self.engine.load_weights(self.trainer.weights())
        return not text

    def say(self, message):
        if self.first:
            tqdm.write(message)

    # --- iterations ---

    @contextmanager
    def saved(self):
        """Around the iterations: afterwards the final model is written, or, after Stopped, the last whole iteration."""
        self.watch.graceful = True
        try:
            yield
            self._write_final_model()
        except Stopped:  # on all ranks, after a signal or a failure
            self._save_and_stop()

    def exit_code(self):
        return self.watch.exit_code() if self.watch.agreed else 0

    def iterations(self):
        """The numbers of the iterations that are left, counted from 0. Evaluates before the first of all."""
        self._begin()
        total, options = self.s.iterations, dict(unit="it", dynamic_ncols=True)
        self.progress = tqdm(initial=self.done, total=total, disable=not self.first, **options)
        for iteration in range(self.done, self.s.iterations):
            self.phase.reset()
            self.grader.counts = dict.fromkeys(self.grader.counts, 0)
            self.aborted = self.engine.aborted
            yield iteration

    def _evaluate(self):
        """Episodes of an evaluation after `done` iterations; None if none is due or left to make.

        None, too, if the run is to stop meanwhile: the caller writes what was done before, and raises Stopped.
        """
        s, last = self.s, self.lines[-1] if self.lines else {}
        made = last.get("iteration") == self.done and "accuracy" in last
        if made or not s.eval_every or self.done % s.eval_every and self.done != s.iterations:
            return None
        self.engine.seed(s.seed, self.done, 1)
        with suppress(Stopped), self.phase("evaluate", can_stop=True):
            return self.evaluate()

    def _begin(self):
        """An evaluation before training, or the one that a stop had cut short; then the files of the run."""
        evaluated = self._evaluate()
        if evaluated is not None:
            self.accuracy = evaluation_metrics(evaluated, self.engine.tensor_parallel)["accuracy"]
            last = self.lines.pop() if self.done else {"iteration": 0}
            self.lines.append(last | {"accuracy": rounded(self.accuracy)})
            self.say(f"accuracy{'' if self.done else ' before training'} {self.accuracy:.3f}")
        if self.first:
            self._write_settings(self.folder)
            run_folder.write_text(self.folder / "inputs.json", json.dumps(self.inputs, indent=1) + "\n")
            self.log = run_folder.open_metrics(self.folder, self.lines)
        if self.watch.agreed:
            raise Stopped

    def finished(self, episodes, metrics):
        """After an iteration: the evaluation, the line of metrics.jsonl, stored episodes and a checkpoint where due.

        episodes: this rank's; metrics: of the update. Raises Stopped if the run was to stop in the evaluation, which
        is made when the run resumes.
        """
        s = self.s
        self.done += 1
        evaluated = self._evaluate()
        metrics = {"iteration": self.done} | self._measured(episodes) | metrics
        if torch.cuda.is_available():
            metrics["gpu_free_gb"] = min(gather_lists([torch.cuda.mem_get_info()[0] / 1e9]))
        if evaluated is not None:
            metrics |= evaluation_metrics(evaluated, self.engine.tensor_parallel)
            self.accuracy = metrics["accuracy"]
        if self.first:
            line = {name: rounded(value) for name, value in metrics.items()}
            self.log.write(json.dumps(line) + "\n")
        self._warn(metrics)
        self._show(metrics)
        if s.store_every and (self.done == 1 or self.done % s.store_every == 0):
            solutions = gather_lists([run_folder.solution(e, self.engine.decode) for e in episodes])
            if self.first:
                path = self.folder / "episodes" / f"{self.done:06}.jsonl.gz"
                run_folder.write_solutions(path, solutions)
        if s.save_every and self.done % s.save_every == 0:
            self._save()
        if self.watch.agreed:
            raise Stopped

    def _measured(self, episodes):
        looked_up, found = (self.phase.cache["sample"][i] + self.phase.cache["values"][i] for i in (0, 1))
        counts = dict(aborted=self.engine.aborted - self.aborted, looked_up=looked_up, found=found)
        counts |= {f"answers_{name}": count for name, count in self.grader.counts.items()}
        counts = {name: count * self.engine.leads for name, count in counts.items()}  # of an engine once
        states = self.estimator.states
        if states and not self.engine.leads:
            states = []
        return iteration_metrics(episodes, states, self.phase.seconds, counts, self.s.epochs)

    def _warn(self, metrics):
        if metrics["aborted"]:
            self.say(
                f"iteration {self.done}: the engine gave up {metrics['aborted']} responses or rollouts; "
                "they count as unfinished"
            )
        for name in ("skipped_steps", "critic_skipped_steps"):
            if metrics.get(name):
                why = "a loss or gradient was not finite, or the mean ratio was too large"
                self.say(f"{metrics[name]} {name.replace('_', ' ')}: {why}")
        gap = disagreement(metrics["logprob_gap"], self.trainer.dtype)
        for name, text in (("gap", gap), ("reward", without_reward(metrics))):
            if text and name not in self.warned:
                self.warned.add(name)
                self.say(text)

    def _show(self, metrics):
        accuracy = "-" if self.accuracy is None else f"{self.accuracy:.3f}"
        shown = dict(reward=f"{metrics['reward']:.2f}", acc=accuracy, kl=f"{metrics['kl']:.3f}")
        self.progress.set_postfix(shown, refresh=False)  # fits 80 columns
        self.progress.update()

    # --- saving ---

    def _write_settings(self, folder):
        run_folder.write_text(folder / "settings.json", json.dumps(asdict(self.s), indent=1) + "\n")

    def _save(self):
        """checkpoints/`done`."""
        run_folder.write_checkpoint(self.folder, self.done, self._write_checkpoint, KEPT_CHECKPOINTS)
        self.saved_until = self.done

    def _write_checkpoint(self, draft):
        self.trainer.save(draft / "state" / "policy")
        self.estimator.save(draft / "state")
        self._write_model(draft)
        if self.first:
            self._write_settings(draft / "state")

    def _write_model(self, draft):
        self.trainer.save_pretrained(self.tokenizer, draft)

    def _save_and_stop(self):
        """Save the last whole iteration; raise the error that stopped the run, if any."""
        if self.progress:
            self.progress.close()
        if self.done > self.saved_until:
            self._save()
        resumes = f"stopped after iteration {self.done}; the same command resumes from there"
        self.say(resumes if self.done else "stopped; there was nothing to save yet")
        if self.watch.error:
            raise self.watch.error

    def _write_final_model(self):
        self.progress.close()
        run_folder.write_folder(self.folder / "model", self._write_model)
        accuracy = "" if self.accuracy is None else f"; accuracy {self.accuracy:.3f}"
        self.say(f"wrote {self.folder / 'model'}{accuracy}")
