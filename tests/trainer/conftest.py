"""What tests of the trainer share; torch is imported where it is asked for, as not all of them need it."""

import pytest


@pytest.fixture
def group_of_one():
    """A process group of this process alone."""
    import torch.distributed as dist

    from trainer.parallel import join_ranks

    join_ranks("cpu")
    yield
    dist.destroy_process_group()
