"""What tests of ds packages share: contract suites of the seams, functions on N ranks, a counter of live memory.

- ``ds_core.testing.<seam>``: the suite of each seam, a class that a plugin's test inherits.
- ``ds_core.testing.ranks``: ``run_ranks`` runs functions on N gloo ranks of one spawn.
- ``ds_core.testing.memory``: ``LiveStorage`` counts the bytes of live tensor storages.
- ``ds_core.testing.state``: ``reset_globals`` resets what a process has only one of; ``fixtures``: ``one_process`` does
  it around every test of a module.
- ``ds_core.testing.resume``: everything that must be equal in a run that was stopped and resumed.
- ``ds_core.testing.anywhere``: a checkpoint of one place (world size, partition, engine) read at another, and what must
  be equal then; ``going_on``: how nearly.
- ``ds_core.testing.reference``, ``low_precision``: training on N ranks against plain PyTorch.
- ``ds_core.testing.incidents``: what may befall one step on one rank, such as an inf, beside the cases of these.
- ``ds_core.testing.matrix``: few cases out of a product of factors: every pair of values, or drawn by the date.

The suites need pytest; nothing here is imported by the rest of ds-core.
"""
