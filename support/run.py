"""A run: where it starts or resumes, its iterations and phases, and what it writes."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from episode import Episode
from support import run_folder
from support.checks import disagreement
from support.metrics import Phases, Report, evaluation_metrics, iteration_metrics, rounded
from support.ranks import from_rank_0, gather_lists
from support.settings import may_change
from support.watch import Stopped

KEPT_CHECKPOINTS = 2  # the newest ones, each with the state to resume from


class Run:
    """The run in --run_dir, new or to be resumed. Raises ValueError if the folder holds another run.

    Made from settings alone, before the ranks have joined: has_ended, lock, check_inputs. Then, on all
    ranks: join, begin, for each of iterations: finished, and at last end; save_and_stop after Stopped.
    """

    def __init__(self, s):
        self.s, self.folder = s, Path(s.run_dir)
        self.lines, self.warned, self.accuracy, self.progress = [], False, None, None
        self._find_start()

    def _find_start(self):
        """Set done, checkpoint (None: from the beginning), and changed (what settings are new).

        A run that was killed before its first checkpoint starts again.
        """
        self.done, self.checkpoint = run_folder.newest_checkpoint(self.folder)
        self.changed = []
        if self.s.resume and not self.checkpoint:
            raise ValueError(f"--resume: {self.folder} holds no checkpoint (--save_every writes them)")
        known = (self.checkpoint / "state" if self.checkpoint else self.folder) / "settings.json"
        if not known.exists():
            self.done, self.checkpoint = 0, None
            return
        before, now = run_folder.read_json(known), asdict(self.s)
        changed = [k for k, v in now.items() if k in before and before[k] != v]
        changed = {k: f"--{k} was {before[k]}, now {now[k]}" for k in changed}
        refused = [words for name, words in changed.items() if name not in may_change(self.s)]
        if refused:
            what = f"--run_dir {self.folder} holds a run with other settings: {'; '.join(refused)}"
            raise ValueError(f"{what}: name another folder, or take them back")
        self.changed = [words for name, words in changed.items() if name not in ("run_dir", "resume")]

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
            what = (
                f"--run_dir {self.folder} was begun with other files: {' and '.join(changed)} changed since"
            )
            raise ValueError(f"{what}; put them back, or name another folder")

    def join(self, watch, engine, grader, trainer, estimator, tokenizer):
        """On all ranks: what the run is made of, set back to the checkpoint from which it resumes."""
        self.watch, self.engine, self.grader = watch, engine, grader
        self.trainer, self.estimator, self.tokenizer = trainer, estimator, tokenizer
        start = self.done, self.checkpoint, self.changed, self.lines
        self.done, self.checkpoint, self.changed, self.lines = from_rank_0(start)
        self.first = dist.get_rank() == 0
        self.saved = self.done
        self.accuracy = next((x["accuracy"] for x in reversed(self.lines) if "accuracy" in x), None)
        self.phase = Phases(watch, engine)
        if self.checkpoint:
            trainer.load(self.checkpoint / "state" / "policy")
            estimator.load(self.checkpoint / "state")
            where = f"resumes after iteration {self.done}, from {self.checkpoint}"
            self.say("; ".join([where, *self.changed]))

    def engine_agrees(self, problems):
        """Whether engine and trainer compute alike, before anything is trained; says it if they do not.

        On 16 tokens to each of 16 problems, other samples on each engine: in bfloat16 a few rare tokens round
        far more than the mean. The engine sleeps afterwards.
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
        if text := disagreement(metrics["logprob_gap"], self.trainer.dtype):
            self.say(text)
        return not text

    def say(self, message):
        if self.first:
            tqdm.write(message)

    # --- iterations ---

    def evaluation_is_due(self, done):
        """Whether an evaluation is due after `done` iterations, and has not been made."""
        s, last = self.s, self.lines[-1] if self.lines else {}
        if not s.eval_every or last.get("iteration") == done and "accuracy" in last:
            return False
        return done % s.eval_every == 0 or done == s.iterations

    def begin(self, evaluated):
        """Before the first iteration.

        evaluated: episodes of the evaluation before training, or of one that a stop had cut short.
        """
        if evaluated is not None:
            self.accuracy = evaluation_metrics(evaluated, self.engine.tensor_parallel)["accuracy"]
            last = self.lines.pop() if self.done else {"iteration": 0}
            self.lines.append(last | {"accuracy": rounded(self.accuracy)})
            self.say(f"accuracy{'' if self.done else ' before training'} {self.accuracy:.3f}")
        if self.first:
            self._settings(self.folder)
            run_folder.write_text(self.folder / "inputs.json", json.dumps(self.inputs, indent=1) + "\n")
            self.log = run_folder.open_metrics(self.folder, self.lines)
            self.report = Report(self.s, self.folder, self.done)
            if evaluated is not None:
                self.report(self.done, {"accuracy": self.accuracy})
        if self.watch.agreed:
            raise Stopped

    def iterations(self):
        """The numbers of the iterations that are left, counted from 0."""
        total, options = self.s.iterations, dict(unit="it", dynamic_ncols=True)
        self.progress = tqdm(initial=self.done, total=total, disable=not self.first, **options)
        for iteration in range(self.done, self.s.iterations):
            self.phase.reset()
            self.grader.counts = dict.fromkeys(self.grader.counts, 0)
            self.aborted = self.engine.aborted
            yield iteration

    def finished(self, iteration, episodes, metrics, evaluated):
        """After an iteration: its line of metrics.jsonl; its stored episodes and a checkpoint where
        they are due.

        episodes: this rank's; metrics: of the update; evaluated: this rank's episodes of an
        evaluation, or None. Raises Stopped if the run was to stop in that evaluation, which is made
        when the run resumes.
        """
        s, self.done = self.s, iteration + 1
        metrics = {"iteration": self.done} | self._measured(episodes) | metrics
        if torch.cuda.is_available():
            metrics["gpu_free_gb"] = min(gather_lists([torch.cuda.mem_get_info()[0] / 1e9]))
        if evaluated is not None:
            metrics |= evaluation_metrics(evaluated, self.engine.tensor_parallel)
            self.accuracy = metrics["accuracy"]
        if metrics["aborted"]:
            what = f"the engine gave up {metrics['aborted']} responses or rollouts; they count as unfinished"
            self.say(f"iteration {self.done}: {what}")
        if self.first:
            line = {name: rounded(value) for name, value in metrics.items()}
            self.log.write(json.dumps(line) + "\n")
            self.report(self.done, metrics)
        self._check(metrics)
        self._show(metrics)
        if s.store_every and (iteration == 0 or self.done % s.store_every == 0):
            solutions = gather_lists([e.as_dict(self.engine.decode) for e in episodes])
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
        of_steps = self.estimator.values_steps
        return iteration_metrics(episodes, self.phase.seconds, counts, self.s.epochs, of_steps)

    def _check(self, metrics):
        """Report what is wrong with an update. Raises RuntimeError with --strict."""
        for name in ("skipped_steps", "critic_skipped_steps"):
            if metrics.get(name):
                why = "a loss or gradient was not finite, or the mean ratio was too large"
                self.say(f"{metrics[name]} {name.replace('_', ' ')}: {why}")
        text = disagreement(metrics["logprob_gap"], self.trainer.dtype)
        if not text:
            return
        if self.s.strict:
            raise RuntimeError(text)
        if not self.warned:
            self.say(text)
        self.warned = True

    def _show(self, metrics):
        accuracy = "-" if self.accuracy is None else f"{self.accuracy:.3f}"
        shown = dict(reward=f"{metrics['reward']:.2f}", acc=accuracy, kl=f"{metrics['kl']:.3f}")
        self.progress.set_postfix(shown, refresh=False)  # fits 80 columns
        self.progress.update()

    # --- saving ---

    def _settings(self, folder):
        run_folder.write_text(folder / "settings.json", json.dumps(asdict(self.s), indent=1) + "\n")

    def _save(self):
        """checkpoints/`done`."""
        run_folder.write_checkpoint(self.folder, self.done, self._write_checkpoint, KEPT_CHECKPOINTS)
        self.saved = self.done

    def _write_checkpoint(self, draft):
        self.trainer.save(draft / "state" / "policy")
        self.estimator.save(draft / "state")
        self._write_model(draft)
        if self.first:
            self._settings(draft / "state")

    def _write_model(self, draft):
        self.trainer.save_pretrained(self.tokenizer, draft)

    def save_and_stop(self):
        """After Stopped: save the last whole iteration; raise the error that stopped the run, if any."""
        if self.progress:
            self.progress.close()
        if self.done > self.saved:
            self._save()
        resumes = f"stopped after iteration {self.done}; the same command resumes from there"
        self.say(resumes if self.done else "stopped; there was nothing to save yet")
        if self.first:
            self.report.close()
        if self.watch.error:
            raise self.watch.error

    def end(self):
        """Write the final model."""
        self.progress.close()
        run_folder.write_folder(self.folder / "model", self._write_model)
        accuracy = "" if self.accuracy is None else f"; accuracy {self.accuracy:.3f}"
        self.say(f"wrote {self.folder / 'model'}{accuracy}")
        if self.first:
            self.report.close()
