"""The job under DeepSpeed, which is imported for `parallel: deepspeed` only.

The order to read it in: `config` (the JSON file and the YAML), `start` (what is done once),
`build`, `trainer` (one step), then `writer`, `files` and `memory`.
"""
