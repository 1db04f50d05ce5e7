import pytest

from ds_core.partition.replicated import ReplicatedPartition
from ds_core.testing.partition import PartitionContract


class TestReplicated(PartitionContract):
    @pytest.fixture
    def partition_class(self):
        return ReplicatedPartition


class TestReplicatedInSmallBuckets(PartitionContract):
    """Several buckets, so that their order and the flags of each are tested."""

    @pytest.fixture
    def partition_class(self):
        return ReplicatedPartition

    @pytest.fixture
    def config_data(self):
        return {"partition": {"replicated": {"bucket_bytes": 100}}}
