"""From text to indexed token files: read, encode on all cores, write, and go on after a kill without a wrong byte.

`inputs` finds files and cuts them into chunks; `encode` makes tokens of one chunk, a pure step that any process may do;
`pool` does that on all cores, in order; `output` appends and keeps the journal; `job` puts them together.
"""
