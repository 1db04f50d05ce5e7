import logging

from ds_core import comm, log, registry
from ds_core.testing.state import reset_globals


def test_every_state_of_the_list_is_reset(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    handlers, propagates = list(log.logger.handlers), log.logger.propagate
    # pytest's own handlers would make configure() leave logging alone.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log.configure("debug")
    comm.init_distributed("gloo", verbose=False)
    found = registry.installed("partition")
    reset_globals()
    assert not comm.is_initialized()
    assert log.logger.handlers == handlers
    assert log.logger.propagate == propagates
    assert log.logger.level == logging.NOTSET
    assert registry.installed("partition") is not found
    reset_globals()
