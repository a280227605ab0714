"""Every field of every section has a docstring: the docs and `--help` are made of them."""

from components.config.field_docs import field_docs, section_doc
from components.config.job import Job
from components.config.job_config import JobConfig
from components.config.optim import ParameterGroup
from components.config.schema import schema_of


def test_no_field_without_docstring() -> None:
    tables = [JobConfig, ParameterGroup, *schema_of(JobConfig).sections.values()]
    bare = [f"{t.__name__}.{name}" for t in tables for name in t.__dataclass_fields__ if not field_docs(t).get(name)]
    assert bare == []


def test_no_section_without_docstring() -> None:
    bare = [table.__name__ for table in schema_of(JobConfig).sections.values() if not section_doc(table)]
    assert bare == []


def test_texts() -> None:
    assert section_doc(Job) == "The run itself."
    assert field_docs(Job)["dump_folder"] == "Folder that everything the run writes goes into; created if missing."
