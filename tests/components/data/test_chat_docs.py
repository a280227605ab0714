"""The example of docs/chat.md does what the page says."""

import json
import re
from pathlib import Path

from components.data.chat.encoder import ChatEncoder
from components.data.chat.template import ChatTemplate, load_chat_template
from components.data.encoding import Seat
from components.data.tokenizer import load_tokenizer
from trainer.config.load import load_job
from trainer.config.validate import require_valid

PAGE = Path("docs/chat.md").read_text()
ASSETS = "tests/assets/tokenizer"


def block(language: str) -> str:
    found = re.search(f"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found.group(1)


def test_its_config_is_one(tmp_path: Path) -> None:
    (tmp_path / "chat.toml").write_text(block("toml"))
    require_valid(load_job(["--job.config_file", str(tmp_path / "chat.toml")], {}), 1)


def test_the_example(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(block("jinja"))
    template, tokenizer = load_chat_template(ASSETS, str(file)), load_tokenizer(ASSETS)
    assert isinstance(template, ChatTemplate)
    encoder, said, texts = ChatEncoder(tokenizer, template), [], []
    for line in block("jsonl").splitlines():
        encoded = encoder.encode(json.loads(line), str, Seat(0, 0))
        assert encoded.targets is not None
        texts.append(tokenizer.decode(encoded.tokens.tolist()))
        said.append(tokenizer.decode(encoded.tokens[encoded.targets].tolist()))
    colours = "# user\nName a colour.\n# assistant\nBlue.<|end_of_text|>\n# user\nAnother.\n# assistant\n"
    assert texts == [
        "# system\nBe brief.\n# user\n2 + 2?\n# assistant\n4<|end_of_text|>\n",
        colours + "Red.<|end_of_text|>\n",
    ]
    assert said == ["4<|end_of_text|>", "Blue.<|end_of_text|>Red.<|end_of_text|>"]
