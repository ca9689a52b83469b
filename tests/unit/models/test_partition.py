"""How ranks share a model: what each of them holds and reads, and models that cannot be shared."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.models.checkpoint import SINGLE_NAME, Checkpoint, StoredTensor
from baton.models.config import ModelConfig
from baton.models.partition import Rank, check_partition
from baton.models.places import PlainPlace, WeightCut
from baton.models.sources import PLAIN, read_sources
from baton.models.weights import load_weights
from baton.node.errors import SettingsError


def load(folder, **options):
    return load_weights(ModelConfig.from_folder(folder), folder, torch.float32, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_share_the_vocabulary(make_model, tied):
    """Guards against a head whose parts overlap or leave tokens out (131 tokens on 2, 4 ranks), and a tied head that is
    counted, or kept, beside the embedding that it reads."""
    folder = make_model("qwen2", tie_word_embeddings=tied).folder
    whole = load(folder, pack=False)
    x = torch.randn(3, whole.embedding.shape[1])
    for count in (2, 4):
        parts = [load(folder, pack=False, rank=Rank(index, count)) for index in range(count)]
        torch.testing.assert_close(torch.cat([part.lm_head(x) for part in parts], -1), whole.lm_head(x))
        assert all(torch.equal(part.embedding, whole.embedding) for part in parts)
        shares = [part.lm_head.weight.untyped_storage().data_ptr() == part.embedding.data_ptr() for part in parts]
        assert shares == [tied] * count
        linears = sum(linear.size_bytes for layer in parts[0].layers for linear in layer.linears)
        head = 0 if tied else parts[0].lm_head.size_bytes
        norms = sum(norm.nbytes for layer in parts[0].layers for norm in layer.vectors) + parts[0].norm.nbytes
        assert parts[0].size_bytes == {"dense": parts[0].embedding.nbytes + linears + head + norms}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc to see which pages were read")
def test_a_rank_reads_only_its_rows_of_a_file(tmp_path):
    """Guards against reading a checkpoint once for each rank: 8 ranks of one host would read it 8 times."""
    save_file({"x": torch.zeros(1 << 14, 1 << 10)}, tmp_path / SINGLE_NAME)  # 64 MiB
    checkpoint = Checkpoint.open(tmp_path)
    place = PlainPlace(torch.empty(1 << 11, 1 << 10), (WeightCut(1 << 14, range(0, 1 << 11)), WeightCut.whole(1 << 10)))
    for _, tensors in read_sources(checkpoint, {"x": StoredTensor(SINGLE_NAME, "x")}):
        place.fill(tensors[PLAIN])
        maps = Path("/proc/self/smaps").read_text().partition(str(tmp_path))[2]
        read_kib = int(re.search(r"Rss: +([0-9]+) kB", maps)[1])
        assert 8 << 10 <= read_kib <= 16 << 10


@pytest.mark.parametrize(
    ("fields", "count", "numbers"),
    [
        ({}, 8, "4 query heads cannot be shared out to 8 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "6 key heads cannot be shared out to 4 ranks"),
        ({"intermediate_size": 81}, 2, "81 rows of an MLP cannot be shared out to 2 ranks"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused_with_the_numbers(make_model, fields, count, numbers):
    """Guards against an error from the middle of loading, where the configuration says enough."""
    config = ModelConfig.from_folder(make_model("llama", **fields).folder)
    check_partition(config, 1)
    with pytest.raises(SettingsError, match=numbers):
        check_partition(config, count)
