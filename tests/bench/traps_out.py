"""Takes the fix of each trap out of a copy of the package, and sees its tests fail.

Run by hand: ``python tests/bench/traps_out.py [TRAP …] [--lanes 2]``. A fix is a piece of the package's text and what
stands there without it. The tests of the trap (``test_trapNN…``, here narrowed to those that show this fix) run on
the copy: they must fail. What they said is printed, so that one sees that they failed for the reason that is meant.
Nothing of the working tree is changed. All of it takes about half an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fix(NamedTuple):
    """A piece of ``llmnb/file`` that is there once, what takes its place, and which tests of the trap then fail."""

    trap: int
    file: str
    text: str
    without: str
    tests: str  # file::part of the names


FIXES = [
    Fix(
        1,
        "engine/loop.py",
        "if self.compute_loss_func is None and not counts_tokens(self.model):",
        "if False:",
        "test_engine_training.py::trap01_a_model_that_drops_the_count",
    ),
    Fix(
        1,
        "engine/losses.py",
        "return total / (targets.shape[0] if num_items_in_batch is None else num_items_in_batch)",
        "return total / targets.shape[0]",
        "test_engine_training.py::trap01_accumulation",
    ),
    Fix(
        1,
        "engine/order.py",
        "return 0 if ranks <= 1 else -rows % (batch * ranks)",
        "return 0",
        "test_engine_training.py::trap01_on_two_ranks",
    ),
    Fix(
        2,
        "engine/training.py",
        "steps=state.max_steps,",
        "steps=self.counts['rows'] * int(state.num_train_epochs)"
        " // (args.per_device_train_batch_size * args.gradient_accumulation_steps),",
        "test_engine_training.py::trap02",
    ),
    Fix(
        3,
        "engine/encoding.py",
        "while self.bos is not None and drop < len(ids) and ids[drop] == self.bos:",
        "while False:",
        "test_engine_templates.py::trap03_one_bos",
    ),
    Fix(
        3,
        "engine/training.py",
        "given, self.tokenizer = self.tokenizer, begins_as_trained(self.tokenizer)",
        "given = self.tokenizer",
        "test_engine_training.py::trap03",
    ),
    Fix(
        3,
        "engine/rows.py",
        "return len(ids) > 1 and ids[0] == ids[1] == self.encoder.bos",
        "return False",
        "test_engine_inspecting.py::trap03",
    ),
    Fix(
        4,
        "engine/rows.py",
        '"labels": torch.from_numpy(labels),',
        '"labels": torch.from_numpy(np.where(ids == self.pad, NO_LOSS, labels)),',
        "test_engine_rows.py::trap04_padding",
    ),
    Fix(
        4,
        "engine/rows.py",
        "ids = begun + self.encoder.end(raw[head:])",
        "ids = begun + raw[head:]",
        "test_engine_rows.py::trap04_the_last_label",
    ),
    Fix(
        5,
        "engine/templates.py",
        "if text.startswith(self.closer, end):\n                return end + len(self.closer)",
        "if text.startswith(self.closer, end):\n                return end",
        "test_engine_templates.py::trap05_every_answer",
    ),
    Fix(
        5,
        "engine/templates.py",
        "if not closed and text.startswith(self.closer, end):",
        "if False:",
        "test_engine_templates.py::trap05_marks",
    ),
    Fix(
        5,
        "engine/counts.py",
        '(self.endless.number, "have an answer',
        '(0, "have an answer',
        "test_engine_inspecting.py::trap05",
    ),
    Fix(
        6,
        "engine/templates.py",
        "found.append((begin, end))\n            at = end\n        return found",
        "found.append((begin, end))\n            at = end\n        return found[-1:]",
        "test_engine_templates.py::trap06_masks",
    ),
    Fix(
        6,
        "engine/templates.py",
        "self.marks_answers = bool(_GENERATION.search(self.source))",
        "self.marks_answers = False",
        "test_engine_templates.py::trap06",
    ),
    Fix(
        7,
        "engine/encoding.py",
        "out.append((head + whole if clean else head + tail + self.after(answer), count, not clean))",
        "out.append((head + whole, count, False))",
        "test_engine_rows.py::trap07",
    ),
    Fix(8, "engine/rows.py", "counts.cut.add(name)", "pass", "test_engine_rows.py::trap08_truncation"),
    Fix(
        8,
        "engine/rows.py",
        "if not ranges:\n            counts.drop(name)\n            return",
        "if not ranges:\n            return",
        "test_engine_rows.py::trap08_a_row_left",
    ),
    Fix(8, "engine/counts.py", "if number > most * self.found:", "if False:", "test_engine_rows.py::trap08_too_many"),
    Fix(
        8,
        "engine/counts.py",
        "(self.dropped.number + self.shortened.number, ",
        "(self.dropped.number, ",
        "test_engine_inspecting.py::trap08",
    ),
    Fix(
        9,
        "engine/rows.py",
        "if refusal is not None and watch is None:",
        "if False:",
        "test_engine_rows.py::trap09",
    ),
    Fix(9, "engine/rows.py", "watch.refusal = refusal", "pass", "test_engine_inspecting.py::trap09"),
    Fix(
        10,
        "engine/arguments.py",
        '"logging_nan_inf_filter": False,',
        '"logging_nan_inf_filter": True,',
        "test_engine_training.py::trap10_nan",
    ),
    Fix(10, "engine/loop.py", "tr_loss.zero_()", "pass", "test_engine_training.py::trap10_nan"),
    Fix(
        10,
        "engine/faults.py",
        "step = min(steps.values())",
        "step = state.global_step",
        "test_engine_training.py::trap10_nan",
    ),
    Fix(
        10,
        "store/tables.py",
        "if isinstance(value, float):\n        return float(value)",
        "if isinstance(value, float):\n        return float(value) if value == value else None",
        "test_store_conformance.py::trap10_metrics",
    ),
    Fix(
        10,
        "series/drawing.py",
        "starts[holed] + (~finite[holed]).argmax(axis=1),\n",
        "",
        "test_series.py::trap10_a_gap",
    ),
    Fix(
        11,
        "engine/packing.py",
        '"position_ids": [place for row in batch for place in range(len(row["input_ids"]))],',
        '"position_ids": [*range(sum(len(row["input_ids"]) for row in batch))],',
        "test_engine_packing.py::trap11_the_second_row",
    ),
    Fix(
        11,
        "engine/rows.py",
        "[(max(begin, 1), min(end, len(ids))) for begin, end in ranges if max(begin, 1) < min(end, len(ids))]",
        "[(begin, min(end, len(ids))) for begin, end in ranges if begin < min(end, len(ids))]",
        "test_engine_packing.py::trap11_the_label",
    ),
    Fix(
        11,
        "engine/packing.py",
        "if between <= most and beside <= MOST_BESIDE:",
        "if True:",
        "test_engine_packing.py::trap11_a_model",
    ),
    Fix(
        12,
        "engine/templates.py",
        "ids, _ = encoder.joined(text, [begin for begin, _ in found])",
        "ids = encoder.ids(text)",
        "test_engine_templates.py::trap12",
    ),
    Fix(
        12,
        "engine/templates.py",
        "ChatTemplate(tokenizer, chat_template).given_tools(tools_of(messages)), Encoder(tokenizer)",
        "ChatTemplate(tokenizer, chat_template), Encoder(tokenizer)",
        "test_engine_tools.py::trap12",
    ),
    Fix(
        13,
        "engine/vocabulary.py",
        "tokenizer.pad_token = tokenizer.eos_token",
        "pass",
        "test_engine_adapters.py::trap13_no_pad",
    ),
    Fix(
        13,
        "engine/vocabulary.py",
        "part[have:] = part[:have].float().mean(dim=0).to(part.dtype)",
        "pass",
        "test_engine_bases.py::trap13_a_new_row",
    ),
    Fix(
        13,
        "engine/adapters.py",
        "trainable_token_indices=list(new_tokens) or None,",
        "trainable_token_indices=None,",
        "test_engine_adapters.py::trap13_added",
    ),
    Fix(
        14,  # transformers asks for these gradients, too
        "engine/training.py",
        "self.model.get_base_model().enable_input_require_grads()",
        "type(self.model.get_base_model()).enable_input_require_grads = lambda model: None",
        "test_engine_adapters.py::trap14_lora_moves_after",
    ),
    Fix(15, "engine/adapters.py", "if missing or not given:", "if False:", "test_engine_adapters.py::trap15_targets"),
    Fix(
        15,
        "engine/adapters.py",
        'if given.lower() == "all-linear":\n            return "all-linear"',
        'if given.lower() == "all-linear":\n'
        '            return [n for n, m in model.named_modules() if hasattr(m, "weight") and "norm" not in n]',
        "test_engine_adapters.py::trap15_all_linear",
    ),
    Fix(
        15,
        "engine/adapters.py",
        "if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head",
        "if isinstance(module, torch.nn.Linear)",
        "test_engine_adapters.py::trap15",
    ),
    Fix(
        16, "engine/adapters.py", "if wrong or len(kinds) > 1:", "if False:", "test_engine_adapters.py::trap16_sixteen"
    ),
    Fix(
        16,
        "engine/arguments.py",
        'base_dtype = precision if config.use_lora else "float32"',
        'base_dtype = "bfloat16"',
        "test_engine_adapters.py::trap16_trained",
    ),
    Fix(
        17,
        "engine/merging.py",
        "return replace(spec, bits=None, model_kwargs=kwargs)",
        "return replace(spec, model_kwargs=kwargs)",
        "test_engine_merging.py::trap17_never",
    ),
    Fix(
        17,
        "engine/merging.py",
        'if getattr(model, "is_quantized", False):',
        "if False:",
        "test_engine_merging.py::trap17_a_base_that_is_only",
    ),
    Fix(
        17,
        "engine/merging.py",
        "adapters.check_base(self.folder, self.spec.model_name_or_path, fingerprint)",
        "pass",
        "test_engine_merging.py::trap17_a_wrong_base",
    ),
    Fix(
        17,
        "engine/merging.py",
        'if not found["max_logit_gap"] <= bound:',
        "if False:",
        "test_engine_merging.py::trap17_a_merge_that",
    ),
    Fix(
        17,
        "engine/adapters.py",
        "if missing or result.unexpected_keys:",
        "if False:",
        "test_engine_merging.py::trap17_keys",
    ),
    Fix(
        17,
        "engine/fingerprints.py",
        "digest.update(data)",
        "pass",
        "test_engine_bases.py::trap17_other_weights",
    ),
    Fix(
        18,
        "engine/arguments.py",
        'zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)',
        'zero.setdefault("stage3_gather_16bit_weights_on_model_save", False)',
        "test_engine_sharing.py::trap18",
    ),
    Fix(
        19,
        "engine/generation.py",
        "model.config.use_cache = True\n        if model.generation_config is not None:\n"
        "            model.generation_config.use_cache = True",
        "pass",
        "test_engine_generation.py::trap19_the_cache_is_on_whatever",
    ),
    Fix(
        19,
        "engine/loop.py",
        "config.use_cache = True\n            undo.callback(setattr, self.args",
        "undo.callback(setattr, self.args",
        "test_engine_training.py::trap19",
    ),
    Fix(
        20,
        "engine/loop.py",
        "self.state.best_model_checkpoint = str(kept) if best or kept.is_dir() else None",
        "pass",
        "test_engine_training.py::trap20",
    ),
    Fix(
        20,
        "launch/reporting.py",
        "step = self.best if self.chooses_best and self.best in steps else max(steps)",
        "step = max(steps)",
        "test_launch_worker.py::trap20",
    ),
    Fix(
        20,
        "launch/reporting.py",
        "for step in to_remove(kept, self.limit, self.best if self.chooses_best else None):",
        "for step in to_remove(kept, self.limit, None):",
        "test_launch_worker.py::trap20",
    ),
    Fix(
        21,
        "engine/loop.py",
        'self._tr_loss += self._open["loss"]',
        "pass",
        "test_engine_training.py::trap21_a_log_window",
    ),
    Fix(
        21,
        "engine/order.py",
        "generator = torch.Generator().manual_seed(self.seed + self.epoch)",
        "generator = None",
        "test_engine_training.py::trap21_resume_is_exact",
    ),
    Fix(
        21,
        "engine/loop.py",
        'if self.order is not None:\n            self.order.set_epoch(int(kwargs["epoch"]))',
        "if False:\n            pass",
        "test_engine_training.py::trap21_resume_on_two",
    ),
    Fix(
        21,
        "launch/reporting.py",
        "resume = None if newest is None else",
        "resume = None if True else",
        "test_launch_resume.py::trap21_trap22",
    ),
    Fix(
        22,
        "engine/loop.py",
        "if self.ending and self.control.should_training_stop and self.saved_step != self.state.global_step:",
        "if False:",
        "test_launch_start.py::trap22",
    ),
    Fix(
        22, "store/checkpoints.py", '"resumable": bool(resume),', '"resumable": False,', "test_launch_worker.py::trap22"
    ),
    Fix(
        22,
        "launch/resuming.py",
        "attempt=attempt + 1,",
        "attempt=attempt,",
        "test_launch_start.py::trap22",
    ),
    Fix(
        23,
        "launch/worker.py",
        'console = os.dup(2) if foreign else to_log_file(own_folder(job.workdir, job.run) / "worker.log")',
        "console = os.dup(2)",
        "test_launch_worker.py::trap23",
    ),
    Fix(
        24,
        "engine/memory.py",
        "traceback.clear_frames(this.__traceback__)",
        "pass",
        "test_engine_memory.py::trap24_after_an_exception",
    ),
    Fix(
        24,
        "engine/training.py",
        "self.__dict__.clear()\n        give_back()",
        "pass",
        "test_engine_memory.py::trap24_after_training",
    ),
    Fix(
        24,
        "engine/generation.py",
        "self._voices = self._voice = None  # type: ignore[assignment]\n        self._loaded",
        "self._loaded",
        "test_engine_memory.py::trap24_after_answers",
    ),
    Fix(
        25,
        "launch/reporting.py",
        "return path if path.name == run else path / run",
        "return path",
        "test_launch_worker.py::trap25_a_job",
    ),
    Fix(
        25,
        "launch/worker.py",
        'if mark.exists() and mark.read_text(encoding="utf-8").strip() not in ("", run):',
        "if False:",
        "test_launch_worker.py::trap25_a_folder",
    ),
    Fix(
        25,
        "store/checkpoints.py",
        'wanted["step"] = int(step)',
        'wanted = {"step": int(step)}',
        "test_store_conformance.py::trap25",
    ),
    Fix(26, "store/checkpoints.py", "if users:", "if False:", "test_store_conformance.py::trap26_a_checkpoint"),
    Fix(
        26,
        "store/artifacts.py",
        'if record["_id"] in needed:',
        "if False:",
        "test_store_conformance.py::trap26_removing",
    ),
    Fix(
        26,
        "store/models.py",
        "if self.checkpoints is not None and not self.checkpoints.has(str(checkpoint)):",
        "if False:",
        "test_store_conformance.py::trap26_a_pointer",
    ),
    Fix(
        26,
        "store/artifacts.py",
        "if self._table.take({**same, **unclaimed}) is None:",
        'if self._table.take({"_id": record["_id"]}) is None:',
        "test_store_artifacts.py::trap26_a_put",
    ),
]


def look(fix: Fix, copy: Path) -> tuple[bool, str]:
    """Did the tests fail without the fix, and what they said."""
    path = copy / "llmnb" / fix.file
    whole = path.read_text(encoding="utf-8")
    file, names = fix.tests.split("::")
    words = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rf", "-k", f"test_{names}", f"tests/{file}"]
    env = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "160"}
    path.write_text(whole.replace(fix.text, fix.without), encoding="utf-8")
    try:
        done = subprocess.run([sys.executable, *words], cwd=copy, env=env, capture_output=True, text=True, check=False)
    finally:
        path.write_text(whole, encoding="utf-8")
    said = re.findall(r"^FAILED tests/(.*)$", done.stdout, re.MULTILINE) or done.stdout.splitlines()[-1:]
    return done.returncode == 1, " ".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traps", nargs="*", type=int, metavar="TRAP", help="all of them when none is named")
    parser.add_argument("--lanes", type=int, default=2, help="how many at a time")
    given = parser.parse_args()
    fixes = [fix for fix in FIXES if not given.traps or fix.trap in given.traps]
    for fix in fixes:
        if (ROOT / "llmnb" / fix.file).read_text(encoding="utf-8").count(fix.text) != 1:
            sys.exit(f"trap {fix.trap}: {fix.file} does not have this once: {fix.text}")
    waiting, kept, lock = iter(fixes), [], threading.Lock()

    def lane(copy: Path) -> None:
        for name in ("llmnb", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        while True:
            with lock:
                fix = next(waiting, None)
            if fix is None:
                return
            failed, said = look(fix, copy)
            with lock:
                kept.append((fix, failed))
                print(f"{'failed' if failed else 'PASSED':7} {fix.trap:2} {fix.file}: {said}"[:400], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        lanes = [threading.Thread(target=lane, args=(Path(folder) / str(at),)) for at in range(given.lanes)]
        for one in lanes:
            one.start()
        for one in lanes:
            one.join()
    missed = [fix for fix, failed in kept if not failed]
    print(f"{len({fix.trap for fix in fixes})} traps, {len(kept)} fixes taken out, {len(missed)} of them unnoticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
