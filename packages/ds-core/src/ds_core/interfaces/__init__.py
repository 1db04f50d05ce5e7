"""The seams of ds-core: one module per seam, each with a contract suite of the same name in ``ds_core.testing``.

These modules import nothing above them and load no torch.
"""
