"""Small wrong changes, each of which a test on the emulated device has to catch.

    python -m tests.gpu_emulated.mutants [NAME ...]

Copies the tree, runs the tests unchanged, then makes one change at a time and runs the test that must fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.emulated_cuda.run import libraries

PROJECT = Path(__file__).parents[2]
HERE = "tests/gpu_emulated"
PASSED, FAILED, LATE = 0, 1, -1
"""pytest's exit codes, others mean that it did not come to the test; and of a launch that took too long."""


@dataclass(frozen=True)
class Mutant:
    """A change, and what it would do on a GPU."""

    file: str
    find: str
    put: str
    test: str
    on_a_gpu: str


MUTANTS = {
    "gradients stay": Mutant(
        "actor/residency.py",
        "buffer.offload_to_cpu(move_params=True, move_grads=True)",
        "buffer.offload_to_cpu(move_params=True, move_grads=False)",
        f"{HERE}/test_memory.py::test_nothing_of_the_actor_is_left_on_the_device[bf16]",
        "4 bytes a parameter stay beside the engines' cache: out of memory",
    ),
    "FP8 copies stay": Mutant(
        "actor/residency.py",
        "            drop_quantized_copies(self._chunks)\n",
        "",
        f"{HERE}/test_memory.py::test_nothing_of_the_actor_is_left_on_the_device[tensorwise]",
        "2 bytes a parameter stay beside the engines' cache: out of memory",
    ),
    "both moments have one place on the host": Mutant(
        "actor/residency.py",
        "((id(p), name), value,",
        '((id(p), "moment"), value,',
        f"{HERE}/test_memory.py::test_what_comes_back_has_the_bits_that_left[bf16]",
        "the first moment comes back as the second: wrong steps, silently",
    ),
    "the device's half of the optimizer stays": Mutant(
        "actor/residency.py",
        'getattr(part.optimizer, "sub_optimizers", [part.optimizer])',
        "[part.optimizer]",
        f"{HERE}/test_memory.py::test_nothing_of_the_actor_is_left_on_the_device"
        "[half of the optimizer on the host]",
        "6 bytes a parameter stay beside the engines' weights: out of memory",
    ),
    "frozen weights do not come back": Mutant(
        "actor/residency.py",
        '            self._frozen.come_back(torch.device("cuda"))\n            self._states',
        "            self._states",
        f"{HERE}/test_memory.py::test_what_comes_back_is_where_it_was[adapters]",
        "the next pass multiplies with weights of the host: an illegal address",
    ),
    "the handle is that of a copy": Mutant(
        "weight_sync/device_bucket.py",
        "reductions.reduce_tensor(self.data)",
        "reductions.reduce_tensor(self.data.clone())",
        f"{HERE}/test_weight_sync.py::test_an_engine_on_the_device_gets_the_export_bit_for_bit"
        "[dense for fp8, bf16]",
        "engines open memory that nobody writes: every update is refused",
    ),
    "every handle is opened on the first device": Mutant(
        "weight_sync/device_bucket.py",
        "torch.uint8, current_device().index)",
        "torch.uint8, 0)",
        f"{HERE}/test_weight_sync.py::test_an_engine_of_two_ranks_gets_the_weights_of_two_actor_ranks_each_on_"
        "its_own_device[dense, tensor=2]",
        "each engine's rank has a context on the first device, and reads over the link",
    ),
    "the second matrix's blocks get the first one's scales": Mutant(
        "fp8.py",
        "scales[(firsts // BLOCK).to(scales.device)",
        "scales[((firsts - firsts[0]) // BLOCK).to(scales.device)",
        f"{HERE}/test_weight_sync.py::test_an_engine_on_the_device_gets_the_export_bit_for_bit"
        "[dense for fp8, gathered, to fp8 engines]",
        "up-projections are scaled wrongly in the engines: other log-probabilities",
    ),
    "held blocks are quantised again": Mutant(
        "weight_sync/shards.py",
        "return self._shard.blocks() or quantize(",
        "return quantize(",
        f"{HERE}/test_weight_sync.py::test_an_engine_on_the_device_gets_the_export_bit_for_bit"
        "[experts for fp8, gathered, to fp8 engines]",
        "engines have other weights than the actor: rounded twice",
    ),
    "loaded FP8 parameters keep the checkpoint's rounding": Mutant(
        "actor/checkpoint.py",
        "        quantize_anew(chunks, optimizer)\n",
        "        pass\n",
        f"{HERE}/test_memory.py::test_a_checkpoint_brings_back_the_bits_that_were_saved"
        "[tensorwise, gathered]",
        "the first passes after a resume differ from the run that was not stopped",
    ),
    "parameters are not gathered in FP8": Mutant(
        "actor/settings.py",
        "fp8_param=fp8.parameter_gather,",
        "fp8_param=False,",
        f"{HERE}/test_memory.py::test_what_leaves_has_the_planned_bytes[tensorwise, gathered]",
        "2 bytes a weight instead of 1: a layout that fits by plan does not",
    ),
    "bf16 moments drop half of the fp32 parameters": Mutant(
        "actor/settings.py",
        "store_param_remainders=False",
        "store_param_remainders=True",
        f"{HERE}/test_memory.py::test_what_leaves_has_the_planned_bytes[bf16 moments]",
        "a resumed run steps from rounded parameters",
    ),
    "the loss is reported by what the pipeline empties": Mutant(
        "actor/actor.py",
        "sums.reports.append((microbatch, replace(terms, sum=terms.sum.detach())))",
        "sums.reports.append((microbatch, terms))",
        f"{HERE}/test_layouts.py::test_losses_and_whole_gradients_equal_the_reference[dense, pipeline=2]",
        "the reported loss of pipelines is that of other memory",
    ),
}


def copied(folder: Path) -> None:
    """The files that git has or would take; a link to a folder is one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name, follow_symlinks=False)


def exit_code(folder: Path, models: Path, *tests: str) -> int:
    """pytest's, of these tests in that tree; LATE, which says nothing of them, of a machine too slow."""
    variables = {"EMULATED_CUDA_BUILD": str(libraries()), "GPU_EMULATED_MODELS": str(models)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.emulated_cuda.run", "-m", "pytest", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=folder, env=os.environ | variables | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode not in (PASSED, FAILED) or (len(tests) > 1 and done.returncode):
        print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    return LATE if done.returncode == FAILED and "TimeoutExpired" in done.stdout else done.returncode


def outcome(mutant: Mutant, folder: Path, models: Path) -> str:
    """Whether the mutant's test fails in the changed tree, which is as before afterwards."""
    file = folder / "megatron_pmd" / mutant.file
    text = file.read_text()
    if text.count(mutant.find) != 1:
        return f"NOT APPLIED: its text is {text.count(mutant.find)} times in {mutant.file}"
    file.write_text(text.replace(mutant.find, mutant.put))
    try:
        code = exit_code(folder, models, mutant.test)
    finally:
        file.write_text(text)
    words = {PASSED: "MISSED", FAILED: "caught", LATE: "NOT RUN: a launch took too long"}
    return words.get(code, f"NOT RUN: pytest ended with {code}")


def main(names: list[str]) -> int:
    """Prints a line for each; returns 1 unless all were caught."""
    chosen = {name: MUTANTS[name] for name in names or MUTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder, models = Path(temporary) / "tree", Path(os.environ.get("GPU_EMULATED_MODELS", temporary))
        copied(folder)
        # by file: of a module's tests among others' its ranks would be launched again
        if exit_code(folder, models, *sorted({mutant.test for mutant in chosen.values()})):
            print("the tests fail without a change")
            return 1
        outcomes = []
        for name, mutant in chosen.items():
            outcomes.append(outcome(mutant, folder, models))
            print(f"{outcomes[-1]}: {name} ({mutant.file})", flush=True)
    return int(set(outcomes) != {"caught"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
