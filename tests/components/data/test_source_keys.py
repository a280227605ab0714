"""Every key of a table of sources does something: from one table to the text of its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.config.data import Source
from components.mesh.batch import IGNORE
from tests.components.data.corpus import tokenizer, write_lines
from tests.components.data.test_tables import config, rows_of, token_file

shows = pytest.mark.shows
CHAT = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}],
    "other": [{"from": "gpt", "value": "One."}, {"from": "human", "value": "On?"}, {"from": "gpt", "value": "Two."}],
    "tools": [{"name": "first"}],
    "functions": [{"name": "second"}],
}
TEMPLATE = (
    "{% if tools %}{{ tools[0].name }} {% endif %}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TEXT = {"text": "def f", "body": "return x"}
ASKED = {"q": "1 + 1?", "a": "two", "s": "sums"}


def written(folder: Path, *records: dict[str, Any]) -> str:
    file = folder / "x.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in records))
    return str(file)


def texts(*sources: Source, rows: int = 1, **data: Any) -> list[tuple[str, str]]:
    """Each row's text, and what is learnt of it; a document a row."""
    made = rows_of(config(*sources, rows=1, seq_len=80, packing="padded", **data), rows)
    decode = tokenizer().decode
    return [(decode([x for x in row if x]), decode([x for x in labels if x != IGNORE])) for row, labels in made]


@shows("data.sources.path", "data.sources.text_field")
def test_text(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    end = "<|end_of_text|>"
    assert texts(Source(path=path)) == [(f"def f{end}", f" f{end}")]
    assert texts(Source(path=path, text_field="body", kind="text")) == [(f"return x{end}", f"turn x{end}")]


@shows("data.sources.dataset")
def test_a_dataset() -> None:
    assert texts(Source(dataset="c4_test"), rows=2) == texts(Source(path="tests/assets/c4_test"), rows=2)
    assert texts(Source(dataset="pystdlib"), rows=2) != texts(Source(dataset="c4_test"), rows=2)


@shows("data.sources.name")
def test_a_name_keys_the_order(tmp_path: Path) -> None:
    """And is what the source is called, which the path says otherwise."""
    path = str(write_lines(tmp_path / "x.jsonl", [f"document {i}" for i in range(20)]))
    plain, same, other = (texts(Source(path=path, name=x), rows=20, shuffle=True) for x in ("", "x", "y"))
    assert plain == same
    assert plain != other
    assert sorted(plain) == sorted(other)


@shows("data.sources.split", "data.sources.subset")
def test_files_by_their_names(tmp_path: Path) -> None:
    for name in ("en/train", "en/test", "de/train"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [f"of {name}"])

    def found(**keys: Any) -> list[str]:
        return [text.removesuffix("<|end_of_text|>") for text, _ in texts(Source(path=str(tmp_path), **keys), rows=3)]

    assert found() == ["of de/train", "of en/test", "of en/train"]
    assert found(split="train") == ["of de/train", "of en/train", "of de/train"]
    assert found(split="train", subset="en") == ["of en/train"] * 3


@pytest.mark.parametrize(
    ("keys", "text", "learnt"),
    [
        pytest.param({}, "first user:Hi?assistant:Yes.<E>", "Yes.<E>", marks=shows("data.sources.chat_template")),
        pytest.param(
            {"messages_field": "other"},
            "first assistant:One.<E>user:On?assistant:Two.<E>",
            "One.<E>Two.<E>",
            marks=shows("data.sources.messages_field"),
        ),
        pytest.param(
            {"tools_field": "functions"},
            "second user:Hi?assistant:Yes.<E>",
            "Yes.<E>",
            marks=shows("data.sources.tools_field"),
        ),
        pytest.param(
            {"messages_field": "other", "train_on": "last"},
            "first assistant:One.<E>user:On?assistant:Two.<E>",
            "Two.<E>",
            marks=shows("data.sources.train_on"),
        ),
        ({"train_on": "all"}, "first user:Hi?assistant:Yes.<E>", "rst user:Hi?assistant:Yes.<E>"),
    ],
)
def test_chats(tmp_path: Path, keys: dict[str, Any], text: str, learnt: str) -> None:
    (tmp_path / "x.jinja").write_text(TEMPLATE)
    source = Source(path=written(tmp_path, CHAT), kind="chat", chat_template=str(tmp_path / "x.jinja"), **keys)
    end = "<|end_of_text|>"
    assert texts(source) == [(text.replace("<E>", end), learnt.replace("<E>", end))]


@shows("data.sources.kind", "data.sources.prompt", "data.sources.answer", "data.sources.system")
def test_instructions(tmp_path: Path) -> None:
    path = written(tmp_path, ASKED)
    source = Source(path=path, kind="instruction", prompt="Q: {q}", answer="{a}!", system="Do {s}.")
    assert texts(Source(path=path, kind="text", text_field="a")) == [("two<|end_of_text|>", "wo<|end_of_text|>")]
    assert texts(source) == [("Do sums.\n\nQ: 1 + 1?\ntwo!<|end_of_text|>", "two!<|end_of_text|>")]


@shows("data.sources.fim_rate", "data.sources.fim_spm_rate", "data.sources.fim_tokens")
def test_fill_in_the_middle(tmp_path: Path) -> None:
    """Marks are letters that the text has not."""
    path = str(write_lines(tmp_path / "x.jsonl", [f"return {i}" for i in range(200)]))

    def begins(**keys: Any) -> list[str]:
        """What each document begins with: a mark, or the text."""
        return [text[:2].strip() for text, _ in texts(Source(path=path, **keys), rows=200)]

    tokens = ["Z", "Q", "J"]
    assert set(begins()) == {"re"}
    some = [x[0] for x in begins(fim_rate=0.25, fim_tokens=tokens)]
    assert 30 < some.count("Z") < 70
    assert some.count("Z") + some.count("r") == 200
    assert {x[:1] for x in begins(fim_rate=1.0, fim_tokens=["K", "Q", "J"])} == {"K"}
    suffix_first = [
        text for text, _ in texts(Source(path=path, fim_rate=1.0, fim_spm_rate=1.0, fim_tokens=tokens), rows=9)
    ]
    assert all(text.startswith("ZQ") for text in suffix_first)
    assert not all(x == "ZQ" for x in begins(fim_rate=1.0, fim_spm_rate=0.0, fim_tokens=tokens))


@shows("data.sources.weight", "data.sources.epochs")
def test_weights_and_epochs(tmp_path: Path) -> None:
    """Three documents of one to one of the other, until that has been read twice."""
    many, few = token_file(tmp_path, "many", [4] * 30, 100), token_file(tmp_path, "few", [4] * 2, 10)
    many, few = Source(path=many.path, weight=3.0), Source(path=few.path, epochs=2)
    mixed = config(many, few, rows=1, seq_len=4, packing="padded")
    found = ["few" if row[0] < 100 else "many" for row, _ in rows_of(mixed, 24)]
    assert [found[i : i + 4].count("few") for i in range(0, 24, 4)] == [1, 1, 1, 1, 0, 0]
