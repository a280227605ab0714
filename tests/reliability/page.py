"""`docs/reliability.md`: what is promised, the tests that try to break it, and what the slow ones found."""

from dataclasses import dataclass

from tests.reliability.harness_figures import figures

HERE = "tests/reliability"
FOLDERS = {"checkpoint": "tests/components/checkpoint", "trainer": "tests/trainer", "keys": "tests/keys",
           "models": "tests/models"}  # fmt: skip


@dataclass(frozen=True)
class Promise:
    """One row of the page."""

    text: str
    """In plain words."""
    tests: tuple[str, ...]
    """`file::function`; the file without `test_` and `.py`, in this folder unless it begins with one of FOLDERS."""
    found: str = ""
    """What was found, where that says more than that the tests pass."""
    figure: str = ""
    """Instead: its name in `figures.json`."""

    def ids(self) -> list[str]:
        """The tests, as pytest wants them."""
        return [_id(*test.split("::")) for test in self.tests]


def _id(file: str, function: str) -> str:
    folder, _, name = file.rpartition("/")
    return f"{FOLDERS[folder] if folder else HERE}/test_{name}.py::{function}"


SECTIONS: dict[str, tuple[Promise, ...]] = {
    "Killed": (
        Promise(
            "A job that is killed (SIGKILL) while it steps, saves, renames or deletes goes on from the newest"
            " checkpoint that had been committed; its losses and weights are those of the undisturbed run, bit for"
            " bit. Saving in the foreground and in the background in turn.",
            ("kill_sweep::test_25_kills", "kill_sweep::test_190_kills"),
            figure="kills",
        ),
        Promise(
            "So does a whole `run_train.sh` on two ranks, with its agent, and no rank outlives its launcher.",
            ("kill_sweep::test_10_kills_of_whole_process_groups",),
            figure="killed groups",
        ),
        Promise(
            "Whichever call of the commit protocol is a process's last, the latest checkpoint is whole.",
            ("faults::test_a_kill_after_each_call", "faults::test_a_kill_before_within_and_after_each_call"),
            figure="kills at each call",
        ),
        Promise(
            "The same in storage that cannot rename (any fsspec URL).",
            ("checkpoint/checkpoint_remote::test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads",),
        ),
        Promise(
            "A killed rank under `MAX_RESTARTS` comes back from the last checkpoint without help.",
            ("hung_ranks::test_a_killed_rank_comes_back_by_itself",),
        ),
    ),
    "Disks that fail": (
        Promise(
            "Whichever call of the commit protocol fails, once or from then on, the previous checkpoint still loads and"
            " no half is taken for a whole.",
            ("faults::test_each_call_fails_once", "faults::test_each_call_fails_with_each_error_once_and_for_good"),
            figure="faults",
        ),
        Promise(
            "The same in storage that cannot rename.",
            ("checkpoint/checkpoint_remote::test_a_failure_at_any_moment_leaves_the_earlier_checkpoint",),
        ),
        Promise(
            "A full disk stops neither training nor its reports; the log says so, earlier checkpoints stay, the next"
            " save with space succeeds.",
            (
                "disk_full::test_it_goes_on_and_saves_again_once_there_is_space",
                "disk_full::test_a_file_system_without_a_free_block",
                "disk_full::test_reports_wait_for_space",
            ),
            "file size limit and a full tmpfs, sync and async: losses equal bit for bit",
        ),
        Promise(
            "It stops at `checkpoint.max_failed_saves` failed saves in a row, on all ranks alike.",
            (
                "disk_full::test_it_stops_at_the_number_of_failed_saves_and_comes_back",
                "checkpoint/saver::test_a_disk_that_is_full_on_one_rank_fails_on_all_alike",
            ),
        ),
    ),
    "Damaged and forged checkpoints": (
        Promise(
            "Every changed byte is found.",
            ("corruption::test_every_changed_byte_is_found", "corruption::test_every_changed_bit_is_found"),
            figure="flips",
        ),
        Promise(
            "So is every length but the right one.",
            ("corruption::test_every_shorter_length_is_found_and_one_that_is_longer",),
            figure="cuts",
        ),
        Promise(
            "So are files that are missing, empty, folders, of another step, or in each other's places; and folders"
            " that have been renamed.",
            (
                "corruption::test_damage_to_whole_files_is_found",
                "corruption::test_checkpoints_that_have_changed_names_are_found",
            ),
        ),
        Promise(
            "A broken latest checkpoint is passed over loudly, or stops the run under `resume = must`.",
            ("keys/resume_keys::test_a_broken_newest_one_is_passed_over_or_stopped_at",),
        ),
        Promise(
            "Loading runs no code and opens nothing outside of the folder, whatever the bytes and the manifest:"
            " pickles, paths, links, pipes, huge sizes and counts, deep nesting.",
            (
                "corruption_hostile::test_what_is_forged_is_refused_and_runs_nothing",
                "corruption_hostile::test_what_is_never_read_may_be_anything",
            ),
            figure="hostile",
        ),
        Promise(
            "Hugging Face files that lie are refused too.",
            ("checkpoint/hf_hostile::test_headers", "checkpoint/hf_hostile::test_every_truncation_is_found"),
        ),
        Promise(
            "After loading, everything is accounted for: nothing missing, unexpected, or left at its first value.",
            (
                "checkpoint/accounting::test_a_state_that_is_not_whole_is_refused",
                "checkpoint/accounting::test_what_is_read_is_counted",
            ),
        ),
    ),
    "Resuming": (
        Promise("On the same layout bit for bit.", ("resume_matrix::test_the_same_layout_goes_on_bit_for_bit",)),
        Promise(
            "On any other layout with the same rows in the same order, and the same losses within 1e-5.",
            ("resume_matrix::test_another_layout_goes_on", "resume_matrix::test_there_and_back"),
            "19 pairs of unlike layouts, 3 of them there and back: rows and cursors equal at every step",
        ),
    ),
    "Signals and ranks that hang": (
        Promise(
            "SIGTERM in each phase of a job ends in a valid checkpoint and exit code 75.",
            ("signals::test_sigterm_in_each_phase_ends_in_a_checkpoint",),
        ),
        Promise(
            "SIGUSR1 saves and goes on.",
            ("signals::test_sigusr1_saves_and_goes_on_and_twice_is_once",),
        ),
        Promise(
            "`run_train.sh` waits for a long save, returns 75, and nothing restarts.",
            ("launched_signals::test_a_long_save_is_waited_for_and_nothing_restarts",),
            "a save of 45 s on two ranks",
        ),
        Promise(
            "A rank that is stopped (SIGSTOP) is named with its place within the timeout and a second.",
            ("trainer/stalls::test_a_stopped_rank_is_named_within_a_second_of_the_timeout",),
        ),
    ),
    "Data and bad steps": (
        Promise(
            "Records, tokenizers, files and workers that fail are told, and never shift what follows.",
            (
                "data_failures::test_what_is_skipped_moves_nothing",
                "data_failures::test_a_tokenizer_that_fails_names_the_document",
                "data_failures::test_a_worker_that_is_killed",
            ),
        ),
        Promise(
            "Going back to the last checkpoint after a bad step ends as skipping it does, on all ranks alike.",
            (
                "trainer/bad_steps::test_going_back_ends_as_skipping_does",
                "trainer/bad_steps::test_two_ranks_go_back_together",
            ),
        ),
    ),
}
PROSE = """# Reliability

<!-- Generated by scripts/generate_docs.py from tests/reliability: edit those, not this page. -->

What is promised of checkpoints and of jobs that come back, and the tests that try to break it. The figures are what
they found when they were last recorded (`tests/reliability/figures.json`):

    ESPALIER_RECORD=1 pytest tests/reliability && scripts/generate_docs.py

Kills and failures are placed by a library that stands between the process and libc (`harness_calls.c`): it sees every
call that changes a file below the folder of the checkpoints, whoever makes it, and fails it or kills the process there.
So the calls are those that are made, not those that somebody listed. It needs Linux and a C compiler.

What is not promised: hashes detect accidents, not malice, so that a forged checkpoint may hold any numbers; with
`checkpoint.verify = "sizes"` changed bytes are not found; and a kill is not a power cut: that what was synced outlives
one is the word of the file system.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([PROSE, *(line for name, rows in SECTIONS.items() for line in _table(name, rows))])


def _table(name: str, rows: tuple[Promise, ...]) -> list[str]:
    head = [f"## {name}\n", "| promise | tests | found |\n|---|---|---|"]
    known = figures()
    return [*head, *(f"| {row.text} | {_tests(row)} | {known.get(row.figure, row.found)} |" for row in rows), ""]


def _tests(row: Promise) -> str:
    return "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.ids())
