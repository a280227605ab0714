"""What tables of sources must say, and may not."""

from pathlib import Path

import pytest

from components.runtime.errors import ConfigError
from trainer.config.load import load_job
from trainer.config.validate import located, validate


def problems(toml: str, tmp_path: Path, *arguments: str) -> list[str]:
    file = tmp_path / "job.toml"
    file.write_text(toml)
    resolved = load_job([f"--job.config_file={file}", *arguments], {})
    return located(validate(resolved.job, 1, None), resolved.provenance | resolved.places)


@pytest.mark.parametrize(
    ("line", "table", "said"),
    [
        (1, "weight = 2", ": does not say where its documents are: set path, or dataset to a registered name"),
        (
            2,
            'dataset = "c4_tst"',
            '.dataset = "c4_tst": must be one of c4, c4_test, c4_validation, pystdlib, pystdlib_validation, synthetic'
            " (or give path); did you mean c4_test?",
        ),
        (
            3,
            'path = "x.jsonl"\nprompt = "{q}"',
            '.prompt = "{q}": only sources of kind "instruction" read it, and this is "auto"',
        ),
        (
            4,
            'path = "x.jsonl"\nkind = "chat"\nfim_rate = 0.5',
            '.fim_rate = 0.5: only sources of kind "auto" or "text" read it, and this is "chat"',
        ),
        (
            1,
            'path = "x.jsonl"\nkind = "instruction"\nprompt = "{q}"',
            '.answer: is missing: say what it is made of, with columns in braces, such as "{question}"',
        ),
        (
            4,
            'path = "x.jsonl"\nfim_rate = 0.5\nfim_tokens = ["a", "b"]',
            '.fim_tokens = ["a", "b"]: must be the tokens before prefix, suffix and middle',
        ),
        (
            3,
            'path = "x.jsonl"\nfim_tokens = ["a", "b", "c"]',
            '.fim_tokens = ["a", "b", "c"]: does nothing while fim_rate is 0; set fim_rate, or leave it out',
        ),
        (
            3,
            'path = "x.jsonl"\nfim_spm_rate = 0.25',
            ".fim_spm_rate = 0.25: does nothing while fim_rate is 0; set fim_rate, or leave it out",
        ),
        (
            3,
            'path = "x.jsonl"\nsplit = "98,x"',
            ".split = '98,x': not shares; allowed: up to three numbers, not negative and not all 0, such as \"98,1,1\"",
        ),
        (
            3,
            'path = "x.jsonl"\nkind = "preference"',
            '.kind = "preference": there is no loss of pairs to train on them with yet; look at them with'
            " scripts/inspect_data.py, or train on the chosen answers as a chat",
        ),
    ],
)
def test_a_table_is_judged(line: int, table: str, said: str, tmp_path: Path) -> None:
    assert problems(f"[[data.sources]]\n{table}\n", tmp_path) == [f"{tmp_path}/job.toml:{line}: data.sources[0]{said}"]


def test_names_are_unique_and_follow_from_paths(tmp_path: Path) -> None:
    toml = "".join(f'[[data.sources]]\npath = "{path}"\n' for path in ("a/web.jsonl", "b/web.jsonl.gz", "b/code"))
    said = "sources are called 'web'; give each a name of its own"
    assert problems(toml, tmp_path) == [
        f"{tmp_path}/job.toml:{1 + 2 * i}: data.sources[{i}].name: 2 {said}" for i in (0, 1)
    ]


def test_names_are_of_characters_that_print(tmp_path: Path) -> None:
    """Reports and messages bring them to a terminal, which would obey others."""
    paths = ("a/naïve 日本.jsonl", "b/\\u001b[2J.jsonl", "b/x\\u009b.jsonl")
    toml = "".join(f'[[data.sources]]\npath = "{path}"\n' for path in paths)
    toml += '[[data.sources]]\npath = "x"\nname = "a\\u202eb\\n"\n'
    names = {1: r"'\x1b[2J'", 2: r"'x\x9b'", 3: r"'a\u202eb\n'"}
    assert problems(toml, tmp_path) == [
        f"{tmp_path}/job.toml:{line}: data.sources[{i}].name: the source is called {names[i]}, which has"
        " characters that do not print; give it a name without such"
        for i, line in ((1, 3), (2, 5), (3, 9))
    ]


def test_validation_takes_no_pairs(tmp_path: Path) -> None:
    toml = '[[validation.sources]]\npath = "x.jsonl"\nkind = "preference"\n'
    assert problems(toml, tmp_path) == []
    assert problems(toml, tmp_path, "--validation.enable") == [
        f'{tmp_path}/job.toml:3: validation.sources[0].kind = "preference": there is no loss of pairs to judge by yet;'
        " look at them with scripts/inspect_data.py, or take the chosen answers as a chat"
    ]


def test_each_problem_names_the_line_of_its_key_or_table(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text('[[data.sources]]\npath = "a.jsonl"\n')
    toml = (
        'extends = "base.toml"\n\n[[data.sources]]\npath = "a.jsonl"\n\n[[data.sources]]\npath = "b.jsonl"\n\n'
        '[[data.sources]]\nweight = 2.0\n\n[[data.sources]]\npath = "d.jsonl"\n\nprompt = "{q}"\n'
    )
    place, nowhere = (
        f"{tmp_path}/job.toml",
        "does not say where its documents are: set path, or dataset to a registered",
    )
    prompt = 'data.sources[3].prompt = "{q}": only sources of kind "instruction" read it, and this is "auto"'
    assert problems(toml, tmp_path) == [
        f"{place}:9: data.sources[2]: {nowhere} name",
        f"{place}:15: {prompt}",
    ]
    assert problems("[data]\nsources = [\n  {path = 'a.jsonl'},\n  {weight = 2.0},\n]\n", tmp_path) == [
        f"{place}:4: data.sources[1]: {nowhere} name"
    ]
    argument = "--data.sources=[{path = 'a.jsonl'}, {weight = 2.0}]"
    assert problems(toml, tmp_path, argument) == [f"{argument}: data.sources[1]: {nowhere} name"]


def test_validation_is_judged_where_it_is_enabled(tmp_path: Path) -> None:
    toml = '[[validation.sources]]\npath = "x.jsonl"\nepochs = 2\n'
    assert problems(toml, tmp_path) == []
    said = "validation.sources[0].epochs = 2: validation reads its documents once; leave it out"
    assert problems(toml, tmp_path, "--validation.enable") == [f"{tmp_path}/job.toml:3: {said}"]
    toml = toml.replace("epochs = 2", "weight = 3")
    assert problems(toml, tmp_path) == []
    said = "validation.sources[0].weight = 3.0: validation reads every set, whatever its share; leave it out"
    assert problems(toml, tmp_path, "--validation.enable") == [f"{tmp_path}/job.toml:3: {said}"]


@pytest.mark.parametrize("key", ["path", "split", "subset"])
def test_an_empty_string_says_nothing(key: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(f'[[data.sources]]\ndataset = "c4_test"\n{key} = ""\n')
    with pytest.raises(ConfigError) as error:
        load_job([f"--job.config_file={file}"], {})
    said = f'data.sources[0].{key} = "": must be a string of at least 1 character or none'
    assert error.value.problems == (f"{file}:3: {said}",)


def test_megatron_order_is_of_token_files_alone(tmp_path: Path) -> None:
    toml = (
        '[data]\norder = "megatron"\npacking = "padded"\nunit = "documents"\n'
        '[[data.sources]]\npath = "a"\nkind = "chat"\n[[data.sources]]\npath = "b"\nepochs = 2\n'
    )
    at, order = f"{tmp_path}/job.toml:", 'data.order = "megatron"'
    assert problems(toml, tmp_path) == [
        f'{at}2: {order}: its samples are cut from one stream; set data.packing = "concat", not "padded"',
        f'{at}4: data.unit = "documents": with {order} samples are blended; set it to "tokens", or data.order ='
        ' "native"',
        f'{at}7: data.sources[0].kind = "chat": {order} reads indexed token files only',
        f"{at}10: data.sources[1].epochs = 2: {order} repeats a source as often as its weight needs; leave it out",
    ]
    assert problems(f"[data]\n{order.removeprefix('data.')}\n", tmp_path) == [
        f"{at}2: {order}: is an order of indexed token files; name them in [[data.sources]]"
    ]


def test_labels_cross_documents_only_where_they_follow_each_other(tmp_path: Path) -> None:
    toml = '[data]\ncross_document_labels = true\ndocument_mask = true\npacking = "best_fit"\n'
    at, key = f"{tmp_path}/job.toml:2", "data.cross_document_labels = true"
    assert problems(toml, tmp_path) == [
        f"{at}: {key}: data.document_mask hides a document from the next one, which therefore cannot be predicted from"
        " it; set one of them to false",
        f'{at}: {key}: needs data.packing = "concat", not "best_fit"',
    ]


def test_a_path_beside_tables_is_not_ignored(tmp_path: Path) -> None:
    toml = '[training]\ndataset_path = "x.jsonl"\n[[data.sources]]\npath = "y.jsonl"\n'
    why = "[[data.sources]] take its place; name it there, or leave it out"
    assert problems(toml, tmp_path) == [f'{tmp_path}/job.toml:2: training.dataset_path = "x.jsonl": {why}']
