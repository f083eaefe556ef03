"""The runnable job: `amsf train` from a config file to a model directory.

The order to read it in: `config` (what can be said), `job` (what happens), `loop` (one step),
`trainer` (what the loop asks of an engine: `torch_trainer`, and `zero` for DeepSpeed), `parallel`
(who holds what). Everything else is a noun that `job` uses: text, tokens, batches, model,
optimizers, checkpoint, evaluation, export, report, charts, launch, signals.
"""
